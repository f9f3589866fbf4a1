"""Reading of volumes: NumPy arrays, NIfTI files, folders with one DICOM series.

Whatever the file's own axes are, a volume comes out as [slices, rows, columns] like a stack of axial images on a
screen: slices from feet to head, rows from front to back, columns from the patient's right to left. Arrays without
an orientation (.npy) are taken to be so already.

A volume is held once: values are converted while they are read, and turned, filled and clipped in place.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llavakit.errors import MediaError, UserError, quoted
from llavakit.media.source import VOXEL_BYTES, Limits, head_of, is_open_file, looks_like, name_of, opened, reading

_WANTED = ".npy, .nii, .nii.gz or a folder with one DICOM series"
_PIECE = 2**20  # values that are converted at a time


class Volume(NamedTuple):
    """A volume.

    Attributes:
        values: float32 [slices, rows, columns]; Hounsfield units where the file states a rescaling to them. With
            `keep_integers` the file's own integers of 8 or 16 bits if it states no rescaling.
        spacing: Millimetres between slices, rows and columns; None if the file does not say.
    """

    values: np.ndarray
    spacing: tuple[float, float, float] | None


def load_volume(
    source: Any,
    *,
    limits: Limits = Limits(),
    fill: float | None = None,
    window: Sequence[float] | None = None,
    orientation: str | None = None,
    affine: str | None = None,
    series: str | None = None,
    gaps: bool = False,
    keep_integers: bool = False,
) -> Volume:
    """A volume as float32 [slices, rows, columns].

    Args:
        source: Path of a .npy or NIfTI file or of a DICOM folder, http(s) or data URL, content of a file, open file,
            or an array.
        limits: What is refused.
        fill: Value for voxels that are NaN or infinite; None refuses such volumes.
        window: (lowest, highest) value; values beyond are clipped.
        orientation: Directions of a NIfTI file's axes ("RAS", "LPS") if the file does not state them.
        affine: "sform" or "qform", for NIfTI files in which the two disagree.
        series: SeriesInstanceUID to take from a folder with several.
        gaps: Accept a DICOM series in which slices are missing.
        keep_integers: Leave integers of 8 and 16 bits as they are, for callers that convert slice by slice; float32
            needs up to four times their memory.

    Raises:
        MediaError: If it cannot be read, is not one volume, or breaks a limit.
        UserError: If the extra with the readers is not installed, or an option is none.
    """
    if window is not None and not _is_window(window):
        raise UserError(f"window: must be two numbers, the lower first, not {quoted(window)}")
    name = name_of(source)
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        from llavakit.media.dicom_series import load_series

        volume = load_series(Path(source), name, limits, series=series, gaps=gaps)
    elif hasattr(source, "__array__") and not is_open_file(source):
        volume = Volume(_from_array(source, name, limits, keep_integers and window is None), None)
    else:
        file = opened(source, limits, _WANTED)
        with reading(name, "cannot be read"):
            stream = file.open("rb") if isinstance(file, Path) else io.BytesIO(file)
        with stream, reading(name, "is damaged", "copy it again"):
            volume = _read_file(file, stream, name, limits, orientation, affine, keep_integers and window is None)
    _finish(volume.values, name, fill, window)
    return volume


def _is_window(window: Any) -> bool:
    numbers = isinstance(window, Sequence) and len(window) == 2 and all(isinstance(value, Real) for value in window)
    return numbers and window[0] < window[1]


def _finish(values: np.ndarray, name: str, fill: float | None, window: Sequence[float] | None) -> None:
    """Fill and clip in place, slice by slice."""
    if values.dtype.kind != "f":
        return
    bad = sum(part.size - int(np.isfinite(part).sum()) for part in values)
    if bad and fill is None:
        raise MediaError(
            f"{name}: {bad:,} of {values.size:,} voxels are NaN or infinite; "
            "give the value to fill in (reading.volume.fill)"
        )
    for part in values:
        if bad:
            part[~np.isfinite(part)] = fill
        if window is not None:
            np.clip(part, *window, out=part)


def _read_file(
    file: Path | bytes | bytearray | memoryview,
    stream: BinaryIO,
    name: str,
    limits: Limits,
    orientation: str | None,
    affine: str | None,
    keep_integers: bool,
) -> Volume:
    head = head_of(file, 8)
    suffix = "".join(Path(name).suffixes[-2:]).lower() if isinstance(file, Path) else ""
    if head.startswith(b"\x93NUMPY") or suffix.endswith(".npy"):
        return Volume(_read_npy(file, stream, name, limits, keep_integers), None)
    if not isinstance(file, Path) or suffix.endswith((".nii", ".nii.gz", ".hdr", ".img", ".mgz", ".mgh")):
        from llavakit.media.nifti import load_nifti

        return load_nifti(file, name, limits, orientation=orientation, choice=affine, keep_integers=keep_integers)
    raise MediaError(f"{name}: is no volume by its name; {looks_like(file)}; it should be {_WANTED}")


def shape_of_volume(shape: Sequence[int], dtype: np.dtype, name: str, limits: Limits) -> tuple[int, int, int]:
    """The three axes of a volume by its header, axes of length 1 in front or behind left out.

    Raises:
        MediaError: If it is none, or has more voxels than the limit.
    """
    if dtype.kind not in "biuf":
        raise MediaError(f"{name}: holds values of type {dtype}; a volume holds real numbers")
    axes = list(shape)
    while len(axes) > 3 and 1 in (axes[0], axes[-1]):
        axes.pop(0 if axes[0] == 1 else -1)
    if len(axes) != 3 or min(axes) < 1:
        raise MediaError(f"{name}: has shape {tuple(shape)}; a volume has three axes (slices, rows, columns)")
    voxels = axes[0] * axes[1] * axes[2]
    if voxels > limits.voxels:
        raise MediaError(f"{name}: has {voxels:,} voxels, the limit is {limits.voxels:,}")
    limits.claim(name, voxels * VOXEL_BYTES)
    return axes[0], axes[1], axes[2]


def kept_type(dtype: np.dtype, keep_integers: bool) -> np.dtype:
    """The type in which values of a file are held."""
    kept = keep_integers and dtype.kind in "iu" and dtype.itemsize <= 2
    return dtype.newbyteorder("=") if kept else np.dtype(np.float32)


def read_numbers(
    stream: BinaryIO,
    count: int,
    dtype: np.dtype,
    target: np.dtype,
    convert: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> np.ndarray:
    """`count` numbers from where a stream is, converted piece by piece [count].

    Raises:
        EOFError: If the stream ends before.
    """
    values = np.empty(count, target)
    for start in range(0, count, _PIECE):
        piece = min(_PIECE, count - start)
        content = stream.read(piece * dtype.itemsize)
        if len(content) < piece * dtype.itemsize:
            raise EOFError(f"it ends after {start + len(content) // dtype.itemsize:,} of {count:,} values")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which `_finish` refuses
            values[start : start + piece] = convert(np.frombuffer(content, dtype))
    return values


def _from_array(source: Any, name: str, limits: Limits, keep_integers: bool) -> np.ndarray:
    with reading(name, "cannot be read as an array"):
        array = np.asarray(source)
    shape = shape_of_volume(array.shape, array.dtype, name, limits)
    with np.errstate(over="ignore"):
        return np.array(array.reshape(shape), dtype=kept_type(array.dtype, keep_integers), order="C")


def _read_npy(file: Any, stream: BinaryIO, name: str, limits: Limits, keep_integers: bool) -> np.ndarray:
    def unread(error: Exception) -> str:
        return f"is not a readable .npy array ({error}); {looks_like(file)}"

    with reading(name, unread):
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(stream)
        if version not in headers:
            raise ValueError(f"format {version[0]}.{version[1]} is not for plain numbers")
        shape, fortran, dtype = headers[version](stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
    axes = shape_of_volume(shape, dtype, name, limits)
    start, size = stream.tell(), stream.seek(0, io.SEEK_END)
    count = axes[0] * axes[1] * axes[2]
    if size - start < count * dtype.itemsize:
        raise MediaError(
            f"{name}: is not a readable .npy array ({count * dtype.itemsize:,} bytes should follow its header,"
            f" {size - start:,} do); it is cut off"
        )
    stream.seek(start)
    values = read_numbers(stream, count, dtype, kept_type(dtype, keep_integers))
    return np.ascontiguousarray(values.reshape(axes, order="F" if fortran else "C"))


def extra(module: str) -> Any:
    """A reader that comes with the extra for medical files.

    Raises:
        UserError: If it is not installed; says how to.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module} is needed to read this file; pip install 'llavakit[medical]'") from None


def upright(data: np.ndarray, affine: np.ndarray) -> Volume:
    """An array with its affine as a volume.

    Axes are permuted and flipped to the nearest of the standard directions; nothing is resampled.

    Args:
        data: [i, j, k], changed in place.
        affine: From voxel indices to millimetres towards right, front and head (RAS) [4, 4].
    """
    orientations = extra("nibabel.orientations")
    current = orientations.io_orientation(affine)
    wanted = orientations.axcodes2ornt(("L", "P", "S"))
    transform = orientations.ornt_transform(current, wanted)
    _flip(data, [axis for axis in range(3) if transform[axis, 1] < 0])
    turned = data.transpose(np.argsort(transform[:, 0]))
    spacing = np.empty(3)
    spacing[current[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = (float(value) for value in spacing)
    return Volume(np.ascontiguousarray(turned.transpose(2, 1, 0)), (z, y, x))


def _flip(data: np.ndarray, axes: Sequence[int]) -> None:
    """Reverse an array along some axes in place, slab by slab."""
    slowest = int(np.argmax(np.abs(data.strides)))
    slabs = np.moveaxis(data, slowest, 0)
    inner = [axis + (axis < slowest) for axis in axes if axis != slowest]
    if inner:
        for slab in slabs:
            slab[...] = np.flip(slab, [axis - 1 for axis in inner]).copy()
    if slowest in axes:
        for index in range(len(slabs) // 2):
            slab = slabs[index].copy()
            slabs[index] = slabs[-1 - index]
            slabs[-1 - index] = slab
