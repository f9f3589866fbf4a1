"""Reading of one DICOM file as a picture: radiographs, ultrasound, endoscopy.

Grey values go through what the standard calls the grey-scale pipeline, each step once: modality LUT or rescaling, then
the VOI LUT or window, then inversion if the file is MONOCHROME1. Colour comes as RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from llavakit.errors import MediaError
from llavakit.media import dicom
from llavakit.media.image import BAND_PIXELS, Scale
from llavakit.media.source import PIXEL_BYTES, Limits, MediaSize, Source

_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def picture_size(file: Source, name: str, limits: Limits) -> MediaSize:
    """The size of a DICOM picture by its header.

    Raises:
        MediaError: If it is none, or breaks a limit.
    """
    rows, columns = dicom.check_size(dicom.read_dataset(file, name, pixels=False), name, limits)
    return MediaSize(1, rows, columns)


def load_picture(file: Source, name: str, limits: Limits, frame: int | None = None) -> Image.Image:
    """A DICOM picture as 8-bit grey or RGB; `info["voi"]` says what brought its grey values to 8 bits.

    Of several windows or tables the first is used, and a table wins over a window. Without either, stored values are
    scaled like those of other 16-bit files (`llavakit.media.image.to_8_bit`), so that a PNG of the same pixels gives
    the same picture. Padding becomes black.

    Args:
        frame: Number of the frame, from 0; None for files with one.

    Raises:
        MediaError: If it holds no pixels, or they cannot be decoded.
    """
    dataset = dicom.read_dataset(file, name)
    rows, columns = dicom.check_size(dataset, name, limits)
    limits.claim(name, rows * columns * PIXEL_BYTES)
    interpretation = dicom.photometric_of(dataset, name)
    stored = dicom.stored_pixels(dataset, name, limits, frame)
    if interpretation in dicom.GREY:
        return _grey(dataset, stored, interpretation == "MONOCHROME1", name)
    if interpretation == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        with dicom.discreet(name, "its palette is damaged", "export it again"):
            return _joined(
                (_eight_bits(apply_color_lut(part, dataset)[..., :3], 16) for part in _bands(stored)), stored
            )
    if stored.ndim != 3:
        raise MediaError(f"{name}: has one value per pixel, its header says colour")
    return Image.fromarray(_eight_bits(stored, dicom.whole_number(dataset, "BitsStored", name, 8)))


def _eight_bits(colours: np.ndarray, bits: int) -> np.ndarray:
    """Colours of up to 16 bits as uint8; the highest 8 bits count, which both customs of writing palettes agree in."""
    return colours if colours.dtype == np.uint8 else (colours >> max(bits - 8, 0)).astype(np.uint8)


def _grey(dataset: Any, stored: np.ndarray, inverted: bool, name: str) -> Image.Image:
    if stored.ndim != 2:
        raise MediaError(f"{name}: has several values per pixel, its header says grey")
    voi, levels_of = _voi(dataset, stored, name)

    def grey(part: np.ndarray) -> np.ndarray:
        with dicom.discreet(name, "its VOI LUT or window is damaged", "export it again"):
            levels = np.rint(levels_of(part))
        if inverted:
            np.subtract(255, levels, out=levels)
        padding = dicom.padding_of(dataset, part, name)
        if padding is not None:
            levels[padding] = 0
        return levels.astype(np.uint8)

    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2:  # each value that occurs is converted once
        lowest = int(stored.min())
        table = grey(np.arange(lowest, int(stored.max()) + 1).astype(stored.dtype))
        parts = (table[part.astype(np.int32) - lowest] for part in _bands(stored))
    else:
        parts = (grey(part) for part in _bands(stored))
    image = _joined(parts, stored)
    image.info["voi"] = voi
    return image


def _joined(parts: Iterable[np.ndarray], stored: np.ndarray) -> Image.Image:
    """Bands of 8-bit grey [rows, columns] or colour [rows, columns, 3] as one picture of the size of `stored`."""
    image, top = None, 0
    for part in parts:
        band = Image.fromarray(part)
        image = image or Image.new(band.mode, stored.shape[1::-1])
        image.paste(band, (0, top))
        top += len(part)
    return image


def _bands(values: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, BAND_PIXELS // values.shape[1])
    return (values[top : top + rows] for top in range(0, len(values), rows))


def _voi(dataset: Any, stored: np.ndarray, name: str) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """What makes grey levels of stored values, and the function from those to levels 0 ... 255."""
    with dicom.discreet(name, "its VOI LUT or window is damaged", "export it again"):
        if sequence := dataset.get("VOILUTSequence"):

            def by_table(part: np.ndarray) -> np.ndarray:
                entries, bits = dicom.look_up(dataset, sequence[0], dicom.measured(dataset, part, name))
                return entries * (255 / (2**bits - 1))

            return "VOI LUT", by_table
        centres, widths = dataset.get("WindowCenter"), dataset.get("WindowWidth")
        if centres is not None and widths is not None and centres != "" and widths != "":
            centre, width = (float(np.atleast_1d(np.asarray(value, np.float64))[0]) for value in (centres, widths))
            function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
            _check_window(width, centre, function, name)
            voi = f"window {centre:g}/{width:g} {function}"
            return voi, lambda part: _window(dicom.measured(dataset, part, name), centre, width, function)
    bits = dicom.whole_number(dataset, "BitsStored", name, 16)
    plain = stored.dtype.kind in "iu" and not dicom.is_rescaled(dataset, name)
    if plain and bits < 8:
        return "none", lambda part: part * (255 / (2**bits - 1))
    scale = Scale(floats=not plain)
    for part in _bands(stored):
        padding = dicom.padding_of(dataset, part, name)
        values = part if plain else dicom.measured(dataset, part, name)
        scale.see(values if padding is None else values[~padding])
    return "none", lambda part: scale(part if plain else dicom.measured(dataset, part, name)).astype(np.float32)


def _check_window(width: float, centre: float, function: str, name: str) -> None:
    if function not in _FUNCTIONS:
        raise MediaError(f"{name}: its VOILUTFunction is none that the standard defines: {', '.join(_FUNCTIONS)}")
    if not np.isfinite([centre, width]).all() or width <= 0 or (function == "LINEAR" and width < 1):
        raise MediaError(f"{name}: its WindowWidth is {width:g}; it should be above 0 (LINEAR: at least 1)")


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Grey levels 0 ... 255 by a window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    offset = values.astype(np.float64) - centre
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return 255 / (1 + np.exp(-4 * offset / width))
    if function == "LINEAR":
        offset, width = offset + 0.5, width - 1
    if width == 0:  # LINEAR with a width of 1 is a threshold
        return np.where(offset > 0, 255.0, 0.0)
    return np.clip((offset / width + 0.5) * 255, 0, 255)
