"""Fetching of media by URL, under a policy.

Safe by default. Media come as data URLs, as uploads, or by http(s) from public addresses. Every connection resolves
the host once, checks every address it resolves to and connects to the checked address, so that neither a redirect
nor a second answer of the name server reaches into a private network. Size and time are limited while bytes arrive;
pixels are limited before they are decoded. Nothing a client names is ever a path on this machine, unless the operator
allows a folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urljoin, urlsplit

from llavakit.errors import UserError
from llavakit.media.policy import MediaPolicy, Refused, decode_data_url

try:
    import httpcore
except ImportError:
    raise UserError("httpcore is needed to fetch media by URL; pip install 'llavakit[serve]'") from None

_KEPT = "%/:=&?~#+!$,;'@()*[]"  # characters of a path and query that stay as they are
DEFAULT = MediaPolicy()  # of callers that name none: what a server allows by default
_REDIRECTS = {301, 302, 303, 307, 308}


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Network backend that connects only to addresses that the policy allows, each checked where it is used."""

    def __init__(self, policy: MediaPolicy) -> None:
        self.policy = policy
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        *others, last = await self.resolve(host, port)
        for address in others:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._inner.connect_tcp(address, port, timeout=timeout, local_address=local_address)
        return await self._inner.connect_tcp(last, port, timeout=timeout, local_address=local_address)

    async def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Any = None) -> Any:
        raise Refused("local sockets are not fetched from")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)

    async def resolve(self, host: str, port: int) -> list[str]:
        """The addresses of the host; all of them must be allowed.

        Raises:
            Refused: If one is not public, or the name is unknown.
        """
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise Refused(f"host {host!r} is unknown") from None
        addresses = [ipaddress.ip_address(entry[4][0].partition("%")[0]) for entry in found]
        for address in addresses:
            if not self.policy.allows(address):
                raise Refused(f"host {host!r} is not a public address; media are fetched from public addresses only")
        if not addresses:
            raise Refused(f"host {host!r} has no address")
        return list(dict.fromkeys(map(str, addresses)))


class Uploads(Protocol):
    """Where uploads are looked up."""

    def get(self, name: str) -> bytes:
        """An upload's content; raises `Refused` if it is unknown."""


class MediaFetcher:
    """Bytes behind the URLs that clients send.

    Args:
        policy: What is allowed.
        uploads: Where `upload:ID` references are looked up.
    """

    def __init__(self, policy: MediaPolicy, uploads: Uploads | None = None) -> None:
        self.policy, self.uploads = policy, uploads

    async def read(self, url: str) -> bytes:
        """The content of a data URL, an upload, an http(s) URL or an allowed file.

        Raises:
            Refused: With the reason and the HTTP status.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return decode_data_url(url, self.policy.file_bytes)
        if scheme == "upload" and self.uploads is not None:
            return self.uploads.get(url.partition(":")[2])
        if scheme == "file" and self.policy.folders:
            return self._allowed_file(url)
        if scheme in ("http", "https"):
            if not self.policy.fetch:
                raise Refused("this server fetches no URLs; send the media item as a data URL or upload it")
            return await self._fetch(url)
        known = "data:, http:, https: and upload: URLs"
        raise Refused(f"{url[:40]!r} cannot be read; this server takes {known}, never paths")

    def _allowed_file(self, url: str) -> bytes:
        path = Path(unquote(urlsplit(url).path)).resolve()
        if not any(path.is_relative_to(folder.resolve()) for folder in self.policy.folders) or not path.is_file():
            raise Refused("this file is not in a folder that the server may read")
        if path.stat().st_size > self.policy.file_bytes:
            raise Refused(f"the file is larger than {self.policy.file_bytes} bytes", 413)
        return path.read_bytes()

    async def _fetch(self, url: str) -> bytes:
        try:
            async with asyncio.timeout(self.policy.seconds), self._pool() as pool:
                for _ in range(self.policy.redirects + 1):
                    target, content = await self._get(pool, url)
                    if target is None:
                        return content
                    url = urljoin(url, target)
                raise Refused(f"more than {self.policy.redirects} redirects")
        except ValueError:
            raise Refused("the other server redirects to a malformed URL") from None
        except TimeoutError:
            raise Refused(f"the download took longer than {self.policy.seconds:g} s", 408) from None
        except httpcore.TimeoutException:
            raise Refused(f"the other server sent nothing for {self.policy.idle_seconds:g} s", 408) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            raise Refused(f"the media item could not be fetched ({type(error).__name__})") from None

    def _pool(self) -> httpcore.AsyncConnectionPool:
        return httpcore.AsyncConnectionPool(network_backend=CheckedBackend(self.policy), max_connections=1, http2=False)

    async def _get(self, pool: httpcore.AsyncConnectionPool, url: str) -> tuple[str | None, bytes]:
        """The content, or where the answer redirects to."""
        address, host = _parsed(url)
        idle = self.policy.idle_seconds
        timeouts = {"connect": idle, "read": idle, "write": idle, "pool": idle}
        headers = {"Host": host, "Accept-Encoding": "identity", "User-Agent": "llavakit"}
        headers["Accept"] = "image/*, video/*, */*;q=0.1"
        async with pool.stream("GET", address, headers=headers, extensions={"timeout": timeouts}) as response:
            fields = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and "location" in fields:
                return fields["location"], b""
            if response.status != 200:
                raise Refused(f"the other server answered with status {response.status}")
            declared = fields.get("content-length", "")
            if declared.isdigit() and int(declared) > self.policy.file_bytes:
                raise Refused(f"the media item is larger than {self.policy.file_bytes} bytes", 413)
            content = bytearray()
            async for chunk in response.aiter_stream():
                content += chunk
                if len(content) > self.policy.file_bytes:
                    raise Refused(f"the media item is larger than {self.policy.file_bytes} bytes", 413)
            return None, bytes(content)


def _parsed(url: str) -> tuple[httpcore.URL, str]:
    """An http(s) URL in parts, and its Host header.

    Raises:
        Refused: If it is something else, or malformed.
    """
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:
        raise Refused("the URL is malformed") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise Refused("only http and https URLs with a host are fetched")
    if parts.username is not None or parts.password is not None:
        raise Refused("URLs with user names are not fetched")
    if not url.isprintable() or any(character in url for character in " \\"):
        raise Refused("the URL is malformed")
    target = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
    name = host.decode()
    name = f"[{name}]" if ":" in name else name
    address = httpcore.URL(scheme=parts.scheme.encode(), host=host, port=port, target=target.encode())
    return address, name if port is None else f"{name}:{port}"


def read_url(url: str, policy: MediaPolicy | None = None) -> bytes:
    """The content behind a data or http(s) URL, for callers that are not asynchronous.

    Args:
        policy: What is allowed; by default what a server allows: public addresses, bounded size and time.

    Raises:
        Refused: With the reason.
    """
    fetcher = MediaFetcher(policy or DEFAULT)
    with ThreadPoolExecutor(1) as worker:  # a thread of its own: the caller's may run an event loop already (notebooks)
        return worker.submit(asyncio.run, fetcher.read(url)).result()
