"""What a client may make the server read: the media policy.

Safe by default. Media come as data URLs, as uploads, or by http(s) from public addresses. Every connection resolves
the host once, checks every address it resolves to and connects to the checked address, so that neither a redirect
nor a second answer of the name server reaches into a private network. Size and time are limited while bytes arrive;
pixels are limited before they are decoded. Nothing a client names is ever a path on this machine, unless the operator
allows a folder.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

import httpcore

from llavakit.errors import UserError
from llavakit.generation.cache import ByteBounded
from llavakit.media.source import Limits

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_DATA_URL = re.compile(
    r"^data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<parameters>(?:;[\w.=+-]+)*?)(?P<base64>;base64)?,", re.ASCII
)
_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is routed in public, special parts aside
_SPECIAL = tuple(  # what `ipaddress` calls global in some releases of Python
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20"))
)
_LIMITS = Limits(pixels=50_000_000, file_bytes=32 * 2**20, frames=512, video_pixels=2**28, voxels=2**27)
_KEPT = "%/:=&?~#+!$,;'@()*[]"  # characters of a path and query that stay as they are
_REDIRECTS = {301, 302, 303, 307, 308}


class Refused(UserError):
    """Media that the policy does not allow, or that could not be fetched; `status` is the HTTP status to answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class MediaPolicy:
    """Limits of one server.

    Attributes:
        fetch: Whether http(s) URLs are fetched at all.
        file_bytes: Largest file, fetched, inlined or uploaded.
        request_bytes: All media of one request together.
        seconds: Longest time for one download, redirects included.
        idle_seconds: Longest time without a byte.
        redirects: Most redirects to follow.
        images, videos, volumes: Most media of each kind in one request.
        limits: What the readers refuse before decoding (pixels, frames, voxels).
        folders: Folders whose files may be named as file:// URLs; none by default.
        networks: Networks that may be fetched from although they are not public (tests, intranets).
    """

    fetch: bool = True
    file_bytes: int = 32 * 2**20
    request_bytes: int = 64 * 2**20
    seconds: float = 20.0
    idle_seconds: float = 5.0
    redirects: int = 3
    images: int = 16
    videos: int = 2
    volumes: int = 2
    limits: Limits = _LIMITS
    folders: tuple[Path, ...] = ()
    networks: tuple[Network, ...] = ()

    def allows(self, address: Address) -> bool:
        """Whether a server at this address may be asked for media."""
        plain = _embedded(address)
        if any(plain.version == network.version and plain in network for network in self.networks):
            return True
        if any(plain.version == network.version and plain in network for network in _SPECIAL):
            return False
        if plain.version == 6 and plain not in _UNICAST:
            return False
        return plain.is_global and not (plain.is_multicast or plain.is_reserved)


def _embedded(address: Address) -> Address:
    """The IPv4 address inside an IPv4-mapped or 6to4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.sixtofour or address
    return address


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


def decode_data_url(url: str, most: int) -> bytes:
    """The content of a data URL.

    Raises:
        Refused: If it is malformed, or longer than `most` bytes.
    """
    header = _DATA_URL.match(url[:256])
    if header is None:
        raise Refused("the data URL is malformed; it should start like data:image/png;base64,")
    if (len(url) - header.end()) * 3 // 4 > most + 3:
        raise Refused(f"the media item is larger than {most} bytes", 413)
    body = url[header.end() :]
    if not header["base64"]:
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise Refused("the data URL does not hold valid base64") from None


class Uploads:
    """Media that clients sent ahead of their requests, in memory under names of the server's own.

    Those that were not used for longest are forgotten when the store is full.

    Args:
        total_bytes: Memory for all of them.
    """

    def __init__(self, total_bytes: int) -> None:
        self._files = ByteBounded(total_bytes)

    def add(self, name: str, content: bytes) -> None:
        """Keep an upload, forgetting old ones if need be."""
        self._files.put(name, content, len(content))

    def get(self, name: str) -> bytes:
        """An upload's content.

        Raises:
            Refused: If it is unknown or forgotten.
        """
        content = self._files.get(name)
        if content is None:
            raise Refused(f"upload {name[:64]!r} is unknown or has been forgotten; upload it again", 404)
        return content

    def remove(self, name: str) -> bool:
        """Forget an upload; whether there was one."""
        known = self._files.get(name) is not None
        self._files.drop(name)
        return known
