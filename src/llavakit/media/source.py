"""Where media come from: paths, bytes, URLs, open files; and the guard in front of the libraries that decode them.

Files come from users and from the web: nothing here trusts them. Whatever is wrong with one becomes a single
`MediaError` line that names the file. Limits are checked on the header, before anything is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from llavakit.errors import MediaError, UserError, shorten

PIXEL_BYTES = 4  # of a pixel of a picture, as Pillow holds it
VOXEL_BYTES = 4  # of a voxel, in float32
Source = str | os.PathLike[str] | bytes | bytearray | memoryview

_BYTES = (bytes, bytearray, memoryview)


class MediaSize(NamedTuple):
    """Size of a media item: frames of a video or slices of a volume (1 for an image), then pixels."""

    depth: int
    height: int
    width: int


def unclaimed(name: str, size: int) -> None:
    """`Limits.claim` where memory is not counted."""


@dataclass(frozen=True)
class Limits:
    """What is refused before it is decoded.

    Attributes:
        pixels: Pixels of an image or of one video frame. The default is where Pillow itself refuses.
        side: Longest side in pixels.
        file_bytes: Size of the file.
        frames, video_pixels: Frames taken from one video, and pixels of all of them together.
        video_frames: Frames that a video may have in all; the default is 18 hours at 60 frames per second.
        voxels: Voxels of a volume.
        claim: Called with the name of a media item and the bytes that it will take, before they are allocated; what it
            raises ends the reading. Servers count the memory of a request with it.
    """

    pixels: int = 178_956_970
    side: int = 65_536
    file_bytes: int = 4 * 1024**3
    frames: int = 4096
    video_pixels: int = 2**31
    voxels: int = 2**30
    video_frames: int = 4_000_000
    claim: Callable[[str, int], None] = unclaimed


class Attached(bytes):
    """The content of a media item with the name that messages call it by: a URL, or a field of a request."""

    def __new__(cls, content: bytes, name: str) -> Attached:
        self = super().__new__(cls, content)
        self.name = name
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Attached, (bytes(self), self.name)


def name_of(source: Any) -> str:
    """What a message calls a source."""
    if isinstance(source, _BYTES):
        return getattr(source, "name", f"<{len(source)} bytes>")
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        return name[:60] + "..." if name.startswith("data:") and len(name) > 60 else shorten(name)
    if is_open_file(source) and isinstance(getattr(source, "name", None), str):
        return shorten(source.name)
    shape = getattr(source, "shape", None)
    kind = type(source).__name__
    return f"<{kind} {'x'.join(map(str, shape))}>" if isinstance(shape, tuple) else f"<{kind}>"


def reason(error: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    text = str(error).strip()
    return shorten(text.splitlines()[0]) if text else type(error).__name__


@contextmanager
def reading(name: str, problem: str | Callable[[Exception], str], advice: str = "") -> Iterator[None]:
    """The guard in front of the libraries that read media: whatever they raise becomes one line.

    Decoders raise what their parsers happen to run into (`KeyError`, `struct.error`, `AssertionError`), so nothing less
    than every exception will do.

    Args:
        name: The file.
        problem: What an exception in here means ("is damaged"); or a function that says so for the exception.
        advice: What would be right.

    Raises:
        MediaError: "name: problem (what the library says); advice".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = f"{problem} ({reason(error)})" if isinstance(problem, str) else problem(error)
        raise MediaError(f"{name}: {text}{'; ' * bool(advice)}{advice}") from None


def is_open_file(source: Any) -> bool:
    """Whether a source is an open file or stream."""
    return callable(getattr(source, "read", None)) and not isinstance(source, (str, os.PathLike, *_BYTES))


def opened(source: Any, limits: Limits, wanted: str) -> Path | bytes | bytearray | memoryview:
    """A source as the path of a file that is there, or as the content of one.

    Data and http(s) URLs are read under the media policy (`llavakit.media.policy`), open files from where they are.

    Args:
        wanted: Which files would be right, for messages.

    Raises:
        MediaError: If it is no file, empty or too large, or may not be fetched.
    """
    name = name_of(source)
    if isinstance(source, str) and (source.startswith("data:") or "://" in source[:100]):
        source = _at_url(source, name, limits)
    elif is_open_file(source):
        source = _content_of(source, name, limits)
    if isinstance(source, _BYTES):
        size = len(source)
    elif isinstance(source, (str, os.PathLike)):
        source = Path(os.fsdecode(source))
        size = _size_of_file(source, name, wanted)
    else:
        raise MediaError(f"{name}: is no file; give a path, a URL, an open file or the content of a file ({wanted})")
    if size == 0:
        raise MediaError(f"{name}: is empty (0 bytes); it should be {wanted}")
    if size > limits.file_bytes:
        raise MediaError(f"{name}: has {size:,} bytes, the limit is {limits.file_bytes:,}")
    return source


def fetched(source: Any, limits: Limits = Limits()) -> Any:
    """A URL as its content, which keeps the URL as its name; everything else as it is.

    For callers that use a source more than once, as every turn of a conversation does.

    Raises:
        MediaError: If it cannot be fetched.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return _at_url(source, name_of(source), limits)
    return source


def _at_url(url: str, name: str, limits: Limits) -> Path | Attached:
    from llavakit.media.policy import Refused, decode_data_url

    scheme = url.partition(":")[0].lower()
    try:
        if scheme == "data":
            return Attached(decode_data_url(url, limits.file_bytes), name)
        if scheme == "file":
            return Path(unquote(urlsplit(url).path))
        if scheme in ("http", "https"):
            from llavakit.media.fetch import read_url

            return Attached(read_url(url), name)
    except Refused as refused:
        raise MediaError(f"{name}: {refused}") from None
    except ValueError as error:
        raise MediaError(f"{name}: is a malformed URL ({reason(error)})") from None
    raise MediaError(f"{name}: addresses of this kind are not read; give a file, a data URL or an http(s) URL")


def _content_of(file: Any, name: str, limits: Limits) -> bytes:
    with reading(name, "cannot be read"):
        content = file.read(limits.file_bytes + 1)
        if not isinstance(content, _BYTES):
            raise MediaError(f"{name}: is open as text; open it in binary mode ('rb')")
        if content and callable(getattr(file, "seekable", None)) and file.seekable():
            file.seek(-len(content), os.SEEK_CUR)  # every turn of a conversation reads it again
    if not content:
        raise MediaError(f"{name}: has no bytes left to read; seek to its beginning first")
    return Attached(content, name)


def _size_of_file(path: Path, name: str, wanted: str) -> int:
    try:
        is_folder, size = path.is_dir(), path.stat().st_size
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        why = getattr(error, "strerror", None) or "cannot be read"
        raise MediaError(f"{name}: {why.lower()}; give a file ({wanted})") from None
    if is_folder:
        raise MediaError(f"{name}: is a folder; give a file ({wanted})")
    if not path.is_file():
        raise MediaError(f"{name}: is a device or pipe, not a file; give a file ({wanted})")
    return size


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


def head_of(source: Source, count: int = 512) -> bytes:
    """The first bytes of a file or of its content."""
    if isinstance(source, _BYTES):
        return bytes(source[:count])
    with Path(source).open("rb") as file:
        return file.read(count)


def is_dicom(file: Source) -> bool:
    """Whether a file begins as DICOM files do: 128 bytes of anything, then DICM."""
    try:
        return head_of(file, 132)[128:] == b"DICM"
    except OSError:  # the reader that opens it says why
        return False


def looks_like(source: Source) -> str:
    """What the first bytes of a file say about it, for messages about files that are not what their name says."""
    try:
        head = head_of(source)
    except OSError as error:
        return f"it cannot be read ({reason(error)})"
    for what, (at, magic) in _MAGIC.items():
        if head[at : at + len(magic)] == magic:
            return f"it begins like {what}"
    text = head.lstrip()[:60]
    if text[:1] == b"<":
        return "it holds HTML or XML, perhaps an error page that was saved in its place"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the real file with `git lfs pull`"
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    if text and printable > 0.95 * len(head):
        return f"it holds text ({text.splitlines()[0].decode('ascii', 'replace')[:30]!r}...)"
    return f"it starts with bytes {head[:8].hex(' ')}"


def check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    """Refuse what has no pixels, or more than the limits allow."""
    if width < 1 or height < 1:
        raise MediaError(f"{name}: is {width} x {height}; it should have at least one pixel")
    if width * height > limits.pixels:
        raise MediaError(f"{name}: is {width} x {height} = {width * height:,} pixels, the limit is {limits.pixels:,}")
    if max(width, height) > limits.side:
        raise MediaError(f"{name}: is {width} x {height}, no side may exceed {limits.side:,} pixels")
