"""Reading of image files as 8-bit RGB."""

from __future__ import annotations

import functools
import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llavakit.errors import MediaError
from llavakit.media.source import Limits, MediaSize, Source, check_file, check_pixels, looks_like, name_of, reason

# Formats whose decoders run inside Pillow; EPS and the like would start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "DIB")
_WANTED = "JPEG, PNG, WebP, GIF, BMP or TIFF"


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


def image_size(source: Source | Image.Image, *, limits: Limits = Limits(), exif_transpose: bool = True) -> MediaSize:
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
    return MediaSize(1, height, width)


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
