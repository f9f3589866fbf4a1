"""What may be read on behalf of somebody else: the media policy, and data URLs.

The server reads what its clients name under this policy, and the readers of `llavakit.media` read URLs under it. This
module opens nothing; `llavakit.media.fetch` does.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from llavakit.errors import MediaError
from llavakit.media.source import Limits

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_DATA_URL = re.compile(
    r"^data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<parameters>(?:;[\w.=+-]+)*?)(?P<base64>;base64)?,", re.ASCII
)
_STEP = 1 << 20  # characters of base64 that are decoded at once; a multiple of four
_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is routed in public, special parts aside
_SPECIAL = tuple(  # what `ipaddress` calls global in some releases of Python
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20"))
)
_LIMITS = Limits(
    pixels=50_000_000, file_bytes=32 * 2**20, frames=512, video_pixels=2**28, voxels=2**27, video_frames=500_000
)


class Refused(MediaError):
    """Media that the policy does not allow, or that could not be fetched; `status` is the HTTP status to answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class MediaPolicy:
    """What may be fetched and read, and how much of it.

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


def decode_data_url(url: str | bytes | bytearray, most: int) -> bytes:
    """The content of a data URL; line breaks and blanks in its base64 are left out, as browsers do.

    Raises:
        Refused: If it is malformed, or longer than `most` bytes.
    """
    url = url.encode("utf-8", "replace") if isinstance(url, str) else url
    header = _DATA_URL.match(url[:256].decode("latin-1"))
    if header is None:
        raise Refused("the data URL is malformed; it should start like data:image/png;base64,")
    body = bytes(memoryview(url)[header.end() :])
    if header["base64"]:
        body = body.translate(None, b" \t\r\n\f")
    if len(body) * 3 // 4 > (most + 3 if header["base64"] else 9 * most // 4):
        raise Refused(f"the media item is larger than {most} bytes", 413)
    content = _from_base64(body) if header["base64"] else unquote_to_bytes(body)
    if len(content) > most:
        raise Refused(f"the media item is larger than {most} bytes", 413)
    return content


def _from_base64(text: bytes) -> bytes:
    """The content of base64 text; in steps, since the decoder lets no other thread run meanwhile."""
    if b"=" in text[:-2]:
        raise Refused("the data URL does not hold valid base64")
    try:
        return b"".join(base64.b64decode(text[at : at + _STEP], validate=True) for at in range(0, len(text), _STEP))
    except (binascii.Error, ValueError):
        raise Refused("the data URL does not hold valid base64") from None
