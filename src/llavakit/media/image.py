"""Reading of image files as 8-bit RGB.

A picture is decoded once and brought to RGB in bands of rows, so that beside the decoded picture and the RGB one
nothing of their size is ever held. What Pillow raises is turned into one line by `llavakit.media.source.reading`.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llavakit.errors import MediaError, UserError, quoted
from llavakit.media.source import (
    PIXEL_BYTES,
    Limits,
    MediaSize,
    Source,
    check_pixels,
    head_of,
    is_dicom,
    is_open_file,
    looks_like,
    name_of,
    opened,
    reading,
    reason,
)

# Formats whose decoders run inside Pillow; EPS and the like would start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "DIB")
_WANTED = "JPEG, PNG, WebP, GIF, BMP or TIFF"
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
BAND_PIXELS = 2**20  # pixels that are converted at a time
ONE_CHANNEL = "one_channel"  # in `Image.info`: whether the picture was grey without transparency before it became RGB
_DECODING = {
    "WEBP": 16,
    "JPEG2000": 20,
    "AVIF": 10,
    "HEIF": 10,
}  # bytes per pixel that these decoders hold at their peak
_PROGRESSIVE = 10  # the same for JPEG files that come in several passes
_BUDGET = 9  # bytes per pixel of the largest picture that is read: three times its 8-bit RGB
_ORIENTATION = 0x0112  # of EXIF
_MOST_CHUNKS = 100_000  # of a PNG behind its pixels

# Pillow warns from half its own limit on, of odd metadata, and the like; our limits and messages say what matters.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow can open."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _file(source: Any, name: str, limits: Limits, frame: int | None) -> Any:
    """An image that is open already, or a file."""
    if frame is not None and (not isinstance(frame, int) or isinstance(frame, bool) or frame < 0):
        raise UserError(f"frame: must be a whole number from 0, not {quoted(frame)}")
    if not isinstance(source, Image.Image) and not is_open_file(source) and hasattr(source, "__array__"):
        source = _from_array(source, name, limits)
    return source if isinstance(source, Image.Image) else opened(source, limits, _WANTED)


def _open(file: Any, name: str, limits: Limits, frame: int | None) -> Image.Image:
    """The image with its header read and its limits checked."""
    if isinstance(file, Image.Image):
        check_pixels(name, *file.size, limits)
        return file
    formats = _formats()
    if _is_heic(file):
        formats = [_heif_format(name)]

    def unopened(error: Exception) -> str:
        if isinstance(error, UnidentifiedImageError):
            return f"is not an image; {looks_like(file)}; it should be {_WANTED}"
        if isinstance(error, Image.DecompressionBombError):
            return f"has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which is refused"
        return f"is cut off or damaged ({reason(error)}); copy it again"

    with reading(name, unopened):
        image = Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=formats)
    if frame is not None:
        frames = getattr(image, "n_frames", 1)
        if not 0 <= frame < frames:
            raise MediaError(f"{name}: has no frame {frame}; it holds {frames}, counted from 0")
        with reading(name, f"its frame {frame} is damaged", "copy it again"):
            image.seek(frame)
    check_pixels(name, *image.size, limits)
    _check_decoding(image, name, limits)
    return image


def _check_decoding(image: Image.Image, name: str, limits: Limits) -> None:
    """Refuse what its decoder would need more memory for than the largest picture of other formats takes."""
    cost = _PROGRESSIVE if image.info.get("progressive") else _DECODING.get(image.format or "", 0)
    if image.width * image.height * cost > limits.pixels * _BUDGET:
        kind = "progressive JPEG" if image.info.get("progressive") else image.format
        raise MediaError(
            f"{name}: is {image.width} x {image.height}; decoding {kind} takes {cost} bytes per pixel, so the limit for"
            f" it is {limits.pixels * _BUDGET // cost:,} pixels; convert it to PNG or baseline JPEG"
        )


def _is_heic(file: Source) -> bool:
    head = head_of(file, 12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC


def _heif_format(name: str) -> str:
    """Pillow's name of the format, once a plugin for it is there.

    Raises:
        MediaError: If none is installed; says how to.
    """
    try:
        import pillow_heif
    except ImportError:
        raise MediaError(
            f"{name}: is a HEIC picture; pip install 'llavakit[heic]' to read it, or convert it to JPEG"
        ) from None
    pillow_heif.register_heif_opener(thumbnails=False)
    return "HEIF"


def image_size(
    source: Any, *, limits: Limits = Limits(), exif_transpose: bool = True, frame: int | None = None
) -> MediaSize:
    """The size that `load_image` would give, from the header alone; pixels are never decoded.

    Raises:
        MediaError: If it is no image or breaks a limit.
    """
    name = name_of(source)
    file = _file(source, name, limits, frame)
    if not isinstance(file, Path):
        return _size(file, name, limits, exif_transpose, frame)
    stat = file.stat()
    version = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return _size_on_disk(version, file, name, limits, exif_transpose, frame)


def _size(file: Any, name: str, limits: Limits, exif_transpose: bool, frame: int | None) -> MediaSize:
    if not isinstance(file, Image.Image) and is_dicom(file):
        from llavakit.media.dicom_picture import picture_size

        return picture_size(file, name, limits)
    image = _open(file, name, limits, frame)
    turned = False
    # Pillow gives the upright size of TIFF files from the beginning, and turns them whenever it decodes them.
    if exif_transpose and (image is file or image.format != "TIFF"):
        with reading(name, "its EXIF data are damaged", "exif_transpose=false reads it as it is stored"):
            turned = _orientation(image, image is file) in (5, 6, 7, 8)  # a quarter turn
    width, height = image.size
    if image is not file:
        image.close()
    return MediaSize(1, width, height) if turned else MediaSize(1, height, width)


@functools.lru_cache(maxsize=2**16)
def _size_on_disk(version: tuple[int, ...], *asked: Any) -> MediaSize:
    """`_size` of a file, remembered while it does not change: every stage of a training asks for it again."""
    return _size(*asked)


def _orientation(image: Image.Image, given: bool) -> Any:
    """The orientation that EXIF or XMP notes, without decoding pixels unless the image was given open."""
    if given or image.format != "PNG":
        return image.getexif().get(_ORIENTATION)
    # EXIF may stand behind the pixels of a PNG, where Pillow looks by decoding them all.
    late = _behind_pixels(image.fp)
    if late is not None:
        image = Image.open(late, formats=["PNG"])
    return Image.Image.getexif(image).get(_ORIENTATION)


def _behind_pixels(file: BinaryIO) -> io.BytesIO | None:
    """A PNG without pixels whose metadata behind the pixels stand in front of them; None if there are none."""
    file.seek(8)
    first, moved = 0, []
    for _ in range(_MOST_CHUNKS):
        start = file.tell()
        head = file.read(8)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IEND", b"fcTL") and first:
            break
        if kind == b"IDAT" and not first:
            first = start
        if first and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            moved.append(head + file.read(length + 4))
        else:
            file.seek(length + 4, io.SEEK_CUR)
    if not moved:
        return None
    file.seek(0)
    end = b"\0\0\0\0IDAT" + b"\0" * 4
    return io.BytesIO(file.read(first) + b"".join(moved) + end)


def load_image(
    source: Any,
    *,
    limits: Limits = Limits(),
    exif_transpose: bool = True,
    background: tuple[int, int, int] | list[int] | None = (255, 255, 255),
    frame: int | None = None,
) -> Image.Image:
    """An image as 8-bit RGB.

    CMYK is converted, grey of 16 or 32 bits is brought to 8 (see `to_8_bit`), palettes are resolved. DICOM pictures go
    through their VOI LUT or window (`llavakit.media.dicom_picture`).

    Args:
        source: Path, http(s) or data URL, content of a file, open file, Pillow image, or array [height, width] or
            [height, width, channels] of 1, 3 or 4 channels.
        limits: What is refused.
        exif_transpose: Turn the image upright as its camera noted. The published code never does; switch it off to
            repeat its numbers on such files. TIFF files always come upright.
        background: Colour behind transparent pixels. None drops the alpha channel as the published code does, which
            shows the colour values of transparent pixels.
        frame: Number of the frame or page, from 0. None takes the first of an animation, and refuses a DICOM file with
            several.

    Raises:
        MediaError: If it cannot be decoded completely, or breaks a limit.
    """
    name = name_of(source)
    file = _file(source, name, limits, frame)
    if not isinstance(file, Image.Image) and is_dicom(file):
        from llavakit.media.dicom_picture import load_picture

        return _to_rgb(load_picture(file, name, limits, frame), None)
    image = _open(file, name, limits, frame)
    limits.claim(name, image.width * image.height * PIXEL_BYTES)
    with reading(name, _undecoded):
        image.load()
    check_pixels(name, *image.size, limits)  # an icon may hold another size than it announces
    if exif_transpose:
        with reading(name, "its EXIF data are damaged", "exif_transpose=false reads it as it is stored"):
            if image.getexif().get(_ORIENTATION, 1) != 1:  # Pillow copies pictures that are upright
                image = ImageOps.exif_transpose(image)
    with reading(name, f"cannot be converted from mode {image.mode} to RGB"):
        if image.mode[0] in "IF":
            image = grey_to_8_bit(image)
        return _to_rgb(image, background)


def _undecoded(error: Exception) -> str:
    cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
    return f"it is {'cut off' if cut else 'damaged'} and cannot be decoded ({reason(error)}); copy it again"


def _to_rgb(image: Image.Image, background: Any) -> Image.Image:
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not transparent or background is None:
        if image.mode == "RGB":
            return image
        converted = image.convert("RGB")
        converted.info[ONE_CHANNEL] = image.mode == "L"
        return converted
    canvas = Image.new("RGB", image.size, tuple(background))
    for top, band in _bands(image):
        band = band.convert("RGBA")
        canvas.paste(band.convert("RGB"), (0, top), mask=band.getchannel("A"))
    return canvas


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in bands of rows, each with its first row."""
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floating point (modes I;16, I and F) as 8-bit grey, see `to_8_bit`."""
    grey = Image.new("L", image.size)
    scale = Scale(image.mode == "F")
    for _, band in _bands(image):
        scale.see(np.asarray(band))
    for top, band in _bands(image):
        grey.paste(Image.fromarray(scale(np.asarray(band))), (0, top))
    return grey


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Values of any real type as uint8 of the same shape.

    Integers are scaled by the depth that their largest value needs (8, 12 or 16 bits: 12-bit radiographs are commonly
    stored in 16-bit files); values that need more, and negative ones, by their range. Floats from 0 to 1 are scaled by
    255, from 0 to 255 kept, anything else by its range; values that are no numbers become black.
    """
    scale = Scale(values.dtype.kind == "f")
    rows = max(1, BAND_PIXELS // max(1, values[0].size))
    for top in range(0, len(values), rows):
        scale.see(values[top : top + rows])
    out = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), rows):
        out[top : top + rows] = scale(values[top : top + rows])
    return out


class Scale:
    """The scaling of `to_8_bit`: it sees all values in pieces first, then converts them in pieces."""

    def __init__(self, floats: bool) -> None:
        self.tops = (1.0, 255.0) if floats else (255.0, 4095.0, 65535.0)
        self.low, self.high = float("inf"), float("-inf")

    def _numbers(self, values: np.ndarray) -> np.ndarray:
        return np.nan_to_num(values.astype(np.float64), copy=False, nan=0.0, posinf=0.0, neginf=0.0)

    def see(self, values: np.ndarray) -> None:
        if not values.size:
            return
        numbers = self._numbers(values)
        self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        numbers = self._numbers(values)
        top = next((top for top in self.tops if self.high <= top), None)
        if self.low < 0 or top is None:
            numbers -= self.low
            top = max(self.high - self.low, 1e-12)
        numbers *= 255.0 / top
        return np.rint(numbers, out=numbers).astype(np.uint8)


def _from_array(source: Any, name: str, limits: Limits) -> Image.Image:
    """A Pillow image of an array, or of a tensor on the CPU."""
    with reading(name, "cannot be read as an array"):
        array = np.asarray(source)
    shape = array.shape
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if (
        array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 3, 4))
        or array.dtype.kind not in "buif"
    ):
        raise MediaError(
            f"{name}: has shape {shape} and type {array.dtype}; an image is an array of real numbers [height, width]"
            " or [height, width, channels] with 1, 3 or 4 channels"
        )
    check_pixels(name, array.shape[1], array.shape[0], limits)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    return Image.fromarray(np.ascontiguousarray(array if array.dtype == np.uint8 else to_8_bit(array)))
