"""Reading of media files: images, videos, volumes.

Files come from users and from the web: nothing here trusts them. Whatever is wrong with one becomes a single
`MediaError` line that names the file. Limits are checked on the header, before anything is decoded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llavakit.errors import MediaError

Source = str | os.PathLike[str] | bytes | bytearray | memoryview


class MediaSize(NamedTuple):
    """Size of a media item: frames of a video or slices of a volume (1 for an image), then pixels."""

    depth: int
    height: int
    width: int


@dataclass(frozen=True)
class Limits:
    """What is refused before it is decoded.

    Attributes:
        pixels: Pixels of an image or of one video frame. The default is where Pillow itself refuses.
        side: Longest side in pixels.
        file_bytes: Size of the file.
        frames, video_pixels: Frames taken from one video, and pixels of all of them together.
        voxels: Voxels of a volume.
    """

    pixels: int = 178_956_970
    side: int = 65_536
    file_bytes: int = 4 * 1024**3
    frames: int = 4096
    video_pixels: int = 2**31
    voxels: int = 2**30


def name_of(source: Any) -> str:
    """What a message calls a source."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return getattr(source, "name", f"<{len(source)} bytes>")
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"<{type(source).__name__}>"


def check_file(source: Source, limits: Limits, wanted: str) -> None:
    """Refuse what is no file, empty or too large.

    Raises:
        MediaError: With the reason.
    """
    name = name_of(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = len(source)
    elif not isinstance(source, (str, os.PathLike)):
        raise MediaError(f"{name}: is no file; give a path or the content of a file ({wanted})")
    else:
        if "://" in name or name.startswith("data:"):
            raise MediaError(f"{name[:60]}: is an address; give a file")
        path = Path(source)
        try:
            is_folder, size = path.is_dir(), path.stat().st_size
        except (OSError, ValueError) as error:  # a name too long, or with a zero byte
            why = getattr(error, "strerror", None) or "cannot be read"
            raise MediaError(f"{name[:200]}: {why.lower()}; give a file ({wanted})") from None
        if is_folder:
            raise MediaError(f"{name}: is a folder; give a file ({wanted})")
    if size == 0:
        raise MediaError(f"{name}: is empty (0 bytes); it should be {wanted}")
    if size > limits.file_bytes:
        raise MediaError(f"{name}: has {size:,} bytes, the limit is {limits.file_bytes:,}")


_MAGIC = {
    "a JPEG file": (0, b"\xff\xd8\xff"),
    "a PNG file": (0, b"\x89PNG"),
    "a GIF file": (0, b"GIF8"),
    "a TIFF file": (0, b"II*\x00"),
    "a big-endian TIFF file": (0, b"MM\x00*"),
    "a WebP file": (8, b"WEBP"),
    "an AVI file": (8, b"AVI "),
    "an MP4 or MOV file": (4, b"ftyp"),
    "a Matroska or WebM file": (0, b"\x1aE\xdf\xa3"),
    "a NumPy array": (0, b"\x93NUMPY"),
    "a gzip file": (0, b"\x1f\x8b"),
    "a DICOM file": (128, b"DICM"),
    "a PDF file": (0, b"%PDF"),
    "a PostScript file": (0, b"%!PS"),
    "a ZIP file": (0, b"PK\x03\x04"),
}


def looks_like(source: Source) -> str:
    """What the first bytes of a file say about it, for messages about files that are not what their name says."""
    head = bytes(source[:512]) if isinstance(source, (bytes, bytearray, memoryview)) else _head(Path(source))
    for what, (at, magic) in _MAGIC.items():
        if head[at : at + len(magic)] == magic:
            return f"it begins like {what}"
    text = head.lstrip()[:60]
    if text[:1] == b"<":
        return "it holds HTML or XML, perhaps an error page that was saved in its place"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the real file with `git lfs pull`"
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    if head and printable > 0.95 * len(head):
        return f"it holds text ({text.splitlines()[0].decode('ascii', 'replace')[:30]!r}...)"
    return f"it starts with bytes {head[:8].hex(' ')}"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    """Refuse what has no pixels, or more than the limits allow."""
    if width < 1 or height < 1:
        raise MediaError(f"{name}: is {width} x {height}; it should have at least one pixel")
    if width * height > limits.pixels:
        raise MediaError(f"{name}: is {width} x {height} = {width * height:,} pixels, the limit is {limits.pixels:,}")
    if max(width, height) > limits.side:
        raise MediaError(f"{name}: is {width} x {height}, no side may exceed {limits.side:,} pixels")


def reason(error: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    text = str(error).splitlines()[0] if str(error) else ""
    return text or type(error).__name__
