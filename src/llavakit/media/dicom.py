"""Reading of one DICOM file: its header, its stored pixels, and what they measure.

Slices of a series (`llavakit.media.dicom_series`) and pictures (`llavakit.media.dicom_picture`) go through here. A
header is full of names, dates and numbers of a patient: no message made here repeats the value of a text field, and
what pydicom warns of or says in an exception is not passed on.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llavakit.errors import MediaError, UserError
from llavakit.media.source import Limits, Source, check_pixels, head_of, is_dicom, looks_like
from llavakit.media.volume import extra

COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")
GREY = ("MONOCHROME1", "MONOCHROME2")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MOST_INFLATED = 512 * 2**20  # bytes of a deflated file

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its lines repeat values of the header


@contextmanager
def discreet(name: str, problem: str, advice: str = "") -> Iterator[None]:
    """`llavakit.media.source.reading` without the exception's text, which may repeat what the header says.

    Warnings of pydicom, which repeat values too, are switched off whenever this is entered: a filter that was set once
    may have been reset since.

    Raises:
        MediaError: "name: problem (type of the exception); advice".
    """
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise MediaError(f"{name}: {problem} ({type(error).__name__}){'; ' * bool(advice)}{advice}") from None


def read_dataset(file: Source, name: str, *, pixels: bool = True, fields: Sequence[str] | None = None) -> Any:
    """The data set of a DICOM file, with or without its pixels.

    Args:
        fields: Keep these alone.

    Raises:
        MediaError: If it is none or damaged.
    """
    pydicom = extra("pydicom")
    with discreet(name, "cannot be read"):
        if not is_dicom(file):
            raise MediaError(f"{name}: is not a readable DICOM file; {looks_like(file)}")
    with discreet(name, "is a damaged DICOM file", "export it again"):
        _check_inflated(file, name)
        source = file if isinstance(file, Path) else io.BytesIO(file)
        tags = None if fields is None else list(fields)
        return pydicom.dcmread(source, stop_before_pixels=not pixels, specific_tags=tags)


def _check_inflated(file: Source, name: str) -> None:
    """Refuse a deflated file that would become larger than any picture: pydicom inflates it at once."""
    if _DEFLATED not in head_of(file, 4096):
        return
    with file.open("rb") if isinstance(file, Path) else io.BytesIO(file) as stream:
        stream.seek(132)
        tag, length, group_length = struct.unpack("<4s2x H I".replace(" ", ""), stream.read(12))
        if tag != b"\2\0\0\0" or length != 4:
            raise MediaError(f"{name}: is deflated, and its header does not say where; export it uncompressed")
        stream.seek(group_length, io.SEEK_CUR)
        inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while piece := inflater.unconsumed_tail or stream.read(2**16):
            total += len(inflater.decompress(piece, 2**20))
            if total > _MOST_INFLATED:
                raise MediaError(f"{name}: is deflated and would have more than {_MOST_INFLATED:,} bytes")


def whole_number(dataset: Any, field: str, name: str, default: int | None = None) -> int:
    """A field that holds one whole number.

    Raises:
        MediaError: If it holds something else, or nothing and there is no default.
    """
    with discreet(name, f"its {field} is damaged"):
        value = dataset.get(field)
        if value is None or value == "":
            value = default
        if value is None:
            raise MediaError(f"{name}: has no {field}, so it is no picture")
        return int(value)


def number(dataset: Any, field: str, name: str, default: float) -> float:
    """A field that holds one finite number.

    Raises:
        MediaError: If it holds something else.
    """
    with discreet(name, f"its {field} is no number"):
        value = dataset.get(field)
        value = default if value is None or value == "" else float(value)
    if not np.isfinite(value):
        raise MediaError(f"{name}: its {field} is {value}; it should be a finite number")
    return value


def photometric_of(dataset: Any, name: str) -> str:
    """PhotometricInterpretation, one of those that are read.

    Raises:
        MediaError: If it is another.
    """
    with discreet(name, "its PhotometricInterpretation is damaged"):
        value = str(dataset.get("PhotometricInterpretation", ""))
    if value not in (*GREY, *COLOUR, "PALETTE COLOR"):
        raise MediaError(
            f"{name}: has a PhotometricInterpretation that is not read; it should be one of {', '.join(GREY)},"
            f" PALETTE COLOR, {', '.join(COLOUR)}"
        )
    return value


def check_size(dataset: Any, name: str, limits: Limits) -> tuple[int, int]:
    """Rows and columns by the header.

    Raises:
        MediaError: If they are none or break a limit.
    """
    rows, columns = whole_number(dataset, "Rows", name), whole_number(dataset, "Columns", name)
    check_pixels(name, columns, rows, limits)
    return rows, columns


def stored_pixels(dataset: Any, name: str, limits: Limits, frame: int | None = None) -> np.ndarray:
    """Pixels as they are stored, [rows, columns] or [rows, columns, 3]; YBR comes as RGB.

    pydicom converts YBR while it decodes and leaves YBR in the header, so nothing may convert again.

    Args:
        frame: Number of the frame, from 0; None for files with one.

    Raises:
        MediaError: If there are none, they cannot be decoded, or `frame` is none of them.
    """
    rows, columns = check_size(dataset, name, limits)
    frames = whole_number(dataset, "NumberOfFrames", name, 1)
    if not any(field in dataset for field in _PIXELS):
        raise MediaError(f"{name}: holds no pixels; it is a DICOM file of another kind than a picture")
    if frames > 1 and frame is None:
        raise MediaError(
            f"{name}: holds {frames} frames; name one, from 0 to {frames - 1} (frame, reading.image.frame)"
        )
    if not 0 <= (frame or 0) < max(frames, 1):
        raise MediaError(f"{name}: has no frame {frame}; it holds {max(frames, 1)}, counted from 0")
    others = _check_decoder(dataset, name)
    from pydicom.pixels import pixel_array

    advice = f"export it again{f', or try another decoder: {others}' * bool(others)}"
    with discreet(name, "its pixels cannot be decoded", advice):
        _check_embedded(dataset, name, rows, columns, frame or 0, frames)
        pixels = pixel_array(dataset, index=frame or 0, view_only=True)  # native pixels without a copy
    if pixels.shape[:2] != (rows, columns) or pixels.ndim > 3 or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise MediaError(f"{name}: has pixels of shape {pixels.shape}, its header says {rows} x {columns}")
    return pixels


def _check_decoder(dataset: Any, name: str) -> str:
    """Refuse a compression that no installed package decodes; the packages that are not installed and would."""
    from pydicom.pixels import get_decoder

    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if syntax is None:
        raise MediaError(f"{name}: does not say how its pixels are stored (TransferSyntaxUID); export it again")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        known = str(syntax) if re.fullmatch(r"[0-9.]{1,64}", str(syntax)) else "of another form"
        raise MediaError(
            f"{name}: its pixels are stored in a transfer syntax that pydicom does not know ({known}); export it"
            " uncompressed"
        ) from None
    packages = "; or ".join(decoder.missing_dependencies)
    if not decoder.is_available:
        raise MediaError(f"{name}: its pixels are stored as {syntax.name}; to decode them install: {packages}")
    return packages


def _check_embedded(dataset: Any, name: str, rows: int, columns: int, frame: int, frames: int) -> None:
    """Refuse a compressed picture of another size than the header says, before it is decoded."""
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    from pydicom.encaps import get_frame

    content = get_frame(dataset.PixelData, frame, number_of_frames=frames)
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG", "JPEG2000"]) as picture:
            size = picture.size
    except (OSError, SyntaxError):  # a form of JPEG that Pillow cannot open
        return
    if size != (columns, rows):
        raise MediaError(f"{name}: its pixels are {size[0]} x {size[1]}, its header says {columns} x {rows}")


def padding_of(dataset: Any, stored: np.ndarray, name: str) -> np.ndarray | None:
    """Where stored grey values are padding [rows, columns]; None if the file knows none."""
    if dataset.get("PixelPaddingValue") is None:
        return None
    first = whole_number(dataset, "PixelPaddingValue", name)
    last = whole_number(dataset, "PixelPaddingRangeLimit", name, first)
    return (stored >= min(first, last)) & (stored <= max(first, last))


def is_rescaled(dataset: Any, name: str) -> bool:
    """Whether what stored values measure differs from them."""
    if dataset.get("ModalityLUTSequence"):
        return True
    return (number(dataset, "RescaleSlope", name, 1.0), number(dataset, "RescaleIntercept", name, 0.0)) != (1.0, 0.0)


def measured(dataset: Any, stored: np.ndarray, name: str) -> np.ndarray:
    """What stored grey values measure: the modality LUT or the rescaling applied, Hounsfield units for CT.

    Returns:
        float32 [rows, columns].

    Raises:
        MediaError: If the LUT or the rescaling is damaged.
    """
    with discreet(name, "its ModalityLUTSequence is damaged", "export it again"):
        if sequence := dataset.get("ModalityLUTSequence"):
            return look_up(dataset, sequence[0], stored)[0].astype(np.float32)
    slope, intercept = number(dataset, "RescaleSlope", name, 1.0), number(dataset, "RescaleIntercept", name, 0.0)
    if slope == 0:
        raise MediaError(f"{name}: its RescaleSlope is 0, which makes all values equal")
    values = stored.astype(np.float32)
    values *= np.float32(slope)
    values += np.float32(intercept)
    return values


def look_up(dataset: Any, item: Any, values: np.ndarray) -> tuple[np.ndarray, int]:
    """Values through a table of a LUT sequence; values beyond its ends take its first or last entry.

    pydicom's `apply_voi` holds positions in the table in the type of its entries, which is too small for a table of
    4096 entries of 8 bits (findings/pydicom_voi_lut_8_bits.sh).

    Returns:
        Entries, and the bits of one.
    """
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    count = count or 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        packed = bits == 8 and len(data) in (count, count + 1)  # two entries per word
        words = "<u2" if dataset.original_encoding[1] else ">u2"
        table = np.frombuffer(data, np.uint8 if packed else words)
    else:
        table = np.atleast_1d(np.asarray(data, np.int64))
    if not len(table) >= count or not 8 <= bits <= 16:
        raise ValueError("the table is shorter than its descriptor says")
    if first >= 2**15 and dataset.get("PixelRepresentation") == 1:
        first -= 2**16  # the descriptor is signed like the pixels, which some writers get wrong
    positions = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return table[positions], bits
