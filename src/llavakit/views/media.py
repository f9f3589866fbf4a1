"""Reading of media files: images, videos, volumes.

Files come from users and from the web: nothing here trusts them. Whatever is wrong with one becomes a single
`MediaError` line that names the file. Limits are checked on the header, before anything is decoded.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llavakit.errors import MediaError
from llavakit.views.plan import MediumSize

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

# Formats whose decoders run inside Pillow; EPS and the like would start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "DIB")
_WANTED = "JPEG, PNG, WebP, GIF, BMP or TIFF"


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


# Images


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow can open."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _open(source: Source | Image.Image, limits: Limits) -> Image.Image:
    """The image with its header read and its limits checked."""
    if isinstance(source, Image.Image):
        check_pixels(name_of(source), *source.size, limits)
        return source
    check_file(source, limits, _WANTED)
    name = name_of(source)
    handle = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning at half the limit
            image = Image.open(handle, formats=_formats())
    except UnidentifiedImageError:
        raise MediaError(f"{name}: is not an image; {looks_like(source)}; it should be {_WANTED}") from None
    except Image.DecompressionBombError:
        raise MediaError(f"{name}: has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which is refused") from None
    except Exception as error:
        raise MediaError(f"{name}: is cut off or damaged ({reason(error)}); copy it again") from None
    check_pixels(name, *image.size, limits)
    return image


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


def image_size(source: Source | Image.Image, *, limits: Limits = Limits(), exif_transpose: bool = True) -> MediumSize:
    """The size that `load_image` would give, from the header alone.

    Raises:
        MediaError: If it is no image or breaks a limit.
    """
    image = _open(source, limits)
    width, height = image.size
    if exif_transpose and image.getexif().get(0x0112) in (5, 6, 7, 8):  # orientation: a quarter turn
        width, height = height, width
    if image is not source:
        image.close()
    return MediumSize(1, height, width)


def load_image(
    source: Source | Image.Image,
    *,
    limits: Limits = Limits(),
    exif_transpose: bool = True,
    background: tuple[int, int, int] | list[int] | None = (255, 255, 255),
) -> Image.Image:
    """An image as 8-bit RGB.

    Of an animation the first frame counts. CMYK is converted, grey of 16 or 32 bits is brought to 8 (see
    `grey_to_8_bit`), palettes are resolved.

    Args:
        source: Path, content of a file, or a Pillow image.
        limits: What is refused.
        exif_transpose: Turn the image upright as its camera noted. The published code never does; switch it off to
            repeat its numbers on such files.
        background: Colour behind transparent pixels. None drops the alpha channel as the published code does, which
            shows whatever colour lies under transparent pixels.

    Raises:
        MediaError: If it cannot be decoded completely, or breaks a limit.
    """
    image, name = _open(source, limits), name_of(source)
    try:
        image.load()
    except Exception as error:
        hint = "it is cut off" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "it is damaged"
        raise MediaError(f"{name}: {hint} and cannot be decoded ({reason(error)}); copy it again") from None
    try:
        if exif_transpose:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, background)
    except (ValueError, OSError, MemoryError) as error:
        raise MediaError(f"{name}: cannot be converted from mode {image.mode} to RGB ({reason(error)})") from None


def _to_rgb(image: Image.Image, background: Any) -> Image.Image:
    if image.mode == "RGB" and (background is None or "transparency" not in image.info):
        return image
    if image.mode[0] in "IF":
        image = grey_to_8_bit(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not transparent or background is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, tuple(background))
    canvas.paste(image.convert("RGB"), mask=alpha)
    return canvas


def grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floating point as 8-bit grey.

    Integers are scaled by the depth that their largest value needs (8, 12 or 16 bits: 12-bit radiographs are commonly
    stored in 16-bit files); values that need more, and negative ones, by their range. Floats from 0 to 1 are scaled by
    255, from 0 to 255 kept, anything else by its range; values that are no numbers become black.
    """
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        tops = (1.0, 255.0)
    else:
        tops = (255.0, 4095.0, 65535.0)
    top = next((top for top in tops if high <= top), None)
    if low < 0 or top is None:
        values, top = values - low, max(high - low, 1e-12)
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def load_video(source: Any, sampling: Any = None, **options: Any) -> Any:
    """The frames of a video, see `llavakit.views.read_video.load_video`."""
    from llavakit.views import read_video

    return read_video.load_video(source, sampling, **options)


def load_volume(source: Any, **options: Any) -> Any:
    """A volume, see `llavakit.views.read_volume.load_volume`."""
    from llavakit.views import read_volume

    return read_volume.load_volume(source, **options)
