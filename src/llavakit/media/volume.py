"""Reading of volumes: NumPy arrays, NIfTI files, folders with one DICOM series.

Whatever the file's own axes are, a volume comes out as [slices, rows, columns] like a stack of axial images on a
screen: slices from feet to head, rows from front to back, columns from the patient's right to left. Arrays without
an orientation (.npy) are taken to be so already.
"""

from __future__ import annotations

import gzip
import struct
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llavakit.errors import MediaError, UserError
from llavakit.media.source import Limits, Source, check_file, looks_like, name_of, reason

_WANTED = ".npy, .nii, .nii.gz or a folder with one DICOM series"
_MOST_OFFSET = 16 * 2**20  # bytes in front of the voxels; nibabel reads them all, and gzip makes zeros of nearly none
_GAP = 1.5  # distance of neighbouring slices, in median distances, from which one counts as missing


class Volume(NamedTuple):
    """A volume.

    Attributes:
        values: float32 [slices, rows, columns]; Hounsfield units where the file states a rescaling to them.
        spacing: Millimetres between slices, rows and columns; None if the file does not say.
    """

    values: np.ndarray
    spacing: tuple[float, float, float] | None


def load_volume(
    source: Source | np.ndarray,
    *,
    limits: Limits = Limits(),
    fill: float | None = None,
    window: Sequence[float] | None = None,
    orientation: str | None = None,
    series: str | None = None,
    gaps: bool = False,
) -> Volume:
    """A volume as float32 [slices, rows, columns].

    Args:
        source: Path of a .npy or NIfTI file or of a DICOM folder, content of a file, or an array.
        limits: What is refused.
        fill: Value for voxels that are NaN or infinite; None refuses such volumes.
        window: (lowest, highest) value; values beyond are clipped.
        orientation: Directions of a NIfTI file's axes ("RAS", "LPS") if the file does not state them.
        series: SeriesInstanceUID to take from a folder with several.
        gaps: Accept a DICOM series in which slices are missing.

    Raises:
        MediaError: If it cannot be read, is not one volume, or breaks a limit.
        UserError: If the extra with the readers is not installed.
    """
    name = name_of(source)
    if isinstance(source, np.ndarray):
        volume = Volume(_three_dimensional(source, name, limits), None)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        check_file(source, limits, _WANTED)
        with _as_file(bytes(source)) as path:
            volume = _read_file(path, name, limits, orientation)
    elif Path(source).is_dir():
        volume = _read_dicom(Path(source), name, limits, series, gaps)
    else:
        check_file(source, limits, _WANTED)
        volume = _read_file(Path(source), name, limits, orientation)
    values = np.array(volume.values, dtype=np.float32, order="C")
    bad = values.size - int(np.isfinite(values).sum())
    if bad and fill is None:
        raise MediaError(
            f"{name}: {bad:,} of {values.size:,} voxels are NaN or infinite; "
            "give the value to fill in (reading.volume.fill)"
        )
    if bad:
        values[~np.isfinite(values)] = fill
    if window is not None:
        np.clip(values, *window, out=values)
    return Volume(values, volume.spacing)


@contextmanager
def _as_file(content: bytes) -> Any:
    """The content as a file whose name says what it is; the readers need one."""
    suffix = ".npy" if content.startswith(b"\x93NUMPY") else ".nii.gz" if content.startswith(b"\x1f\x8b") else ".nii"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"volume{suffix}"
        path.write_bytes(content)
        yield path


def _read_file(path: Path, name: str, limits: Limits, orientation: str | None) -> Volume:
    if path.suffix == ".npy":
        return _read_npy(path, name, limits)
    if path.name.endswith((".nii", ".nii.gz", ".hdr", ".img", ".mgz", ".mgh")):
        return _read_nifti(path, name, limits, orientation)
    raise MediaError(f"{name}: is no volume by its name; {looks_like(path)}; it should be {_WANTED}")


def _three_dimensional(array: np.ndarray, name: str, limits: Limits) -> np.ndarray:
    """The array with axes of length 1 in front or behind removed, checked."""
    if array.dtype.kind not in "biuf":
        raise MediaError(f"{name}: holds values of type {array.dtype}; a volume holds real numbers")
    shape = array.shape
    while array.ndim > 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 3 or 0 in array.shape:
        raise MediaError(f"{name}: has shape {tuple(shape)}; a volume has three axes (slices, rows, columns)")
    if array.size > limits.voxels:
        raise MediaError(f"{name}: has {array.size:,} voxels, the limit is {limits.voxels:,}")
    return array


def _read_npy(path: Path, name: str, limits: Limits) -> Volume:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        hint = "it is cut off" if "greater than" in str(error) or "mmap" in str(error) else looks_like(path)
        raise MediaError(f"{name}: is not a readable .npy array ({reason(error)}); {hint}") from None
    return Volume(_three_dimensional(array, name, limits), None)


def _extra(module: str) -> Any:
    """A reader that comes with the extra for medical files.

    Raises:
        UserError: If it is not installed; says how to.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module} is needed to read this file; pip install 'llavakit[medical]'") from None


def _upright(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """An array with its affine (voxel indices to RAS millimetres) as [slices, rows, columns] and spacing.

    Axes are permuted and flipped to the nearest of the standard directions; nothing is resampled.
    """
    orientations = _extra("nibabel.orientations")
    current = orientations.io_orientation(affine)
    wanted = orientations.axcodes2ornt(("L", "P", "S"))
    turned = orientations.apply_orientation(data, orientations.ornt_transform(current, wanted))
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    spacing = np.empty(3)
    spacing[current[:, 0].astype(int)] = sizes
    x, y, z = (float(value) for value in spacing)
    return turned.transpose(2, 1, 0), (z, y, x)


def _read_nifti(path: Path, name: str, limits: Limits, orientation: str | None) -> Volume:
    nibabel = _extra("nibabel")
    try:
        offset = _voxel_offset(path)
        if offset > _MOST_OFFSET:
            raise ValueError(f"its voxels begin at byte {offset:,.0f}, the limit is {_MOST_OFFSET:,}")
        image = nibabel.load(path)
    except Exception as error:
        why = reason(error).replace(str(path), path.name)
        raise MediaError(f"{name}: is not a readable NIfTI file ({why}); {looks_like(path)}") from None
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or 0 in shape:
        what = f"{shape[3]} volumes" if len(shape) == 4 else f"{len(shape)} axes"
        raise MediaError(f"{name}: has shape {tuple(image.shape)}, {what}; split it and give one volume of three axes")
    if np.prod(shape, dtype=np.int64) > limits.voxels:
        raise MediaError(f"{name}: has {np.prod(shape, dtype=np.int64):,} voxels, the limit is {limits.voxels:,}")
    affine = _affine(image, name, orientation)
    try:
        data = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    except Exception as error:
        raise MediaError(f"{name}: is cut off or damaged ({reason(error)}); copy it again") from None
    return Volume(*_upright(data, affine))


def _voxel_offset(path: Path) -> float:
    """Where a NIfTI file says its voxels begin; 0 if it does not say."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        head = file.read(540)
    for order in "<>":
        size = struct.unpack_from(f"{order}i", head.ljust(4, b"\0"))[0]
        if size == 348 <= len(head):
            return struct.unpack_from(f"{order}f", head, 108)[0]
        if size == 540 <= len(head):
            return struct.unpack_from(f"{order}q", head, 168)[0]
    return 0


def _affine(image: Any, name: str, orientation: str | None) -> np.ndarray:
    header = image.header
    unstated = hasattr(header, "get_sform") and header["sform_code"] == 0 and header["qform_code"] == 0
    if unstated:
        if orientation is None:
            raise MediaError(
                f"{name}: does not say how its axes lie in the patient (sform and qform codes are 0);"
                " give the orientation, for example RAS (reading.volume.orientation)"
            )
        orientations = _extra("nibabel.orientations")
        try:
            axes = orientations.axcodes2ornt(tuple(orientation.upper()))
        except (ValueError, KeyError):
            axes = np.full((3, 2), np.nan)
        if axes.shape != (3, 2) or np.isnan(axes).any() or len(set(axes[:, 0])) != 3:
            raise UserError(f"orientation: {orientation!r} is none; write one letter per axis, for example 'RAS'")
        affine = np.eye(4)
        affine[:3, :3] = 0
        for axis, ((row, sign), size) in enumerate(zip(axes, header.get_zooms()[:3], strict=True)):
            affine[int(row), axis] = sign * float(size)
        return affine
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise MediaError(f"{name}: its affine is singular or not finite, so its axes have no directions")
    return affine


# DICOM


def _read_dicom(folder: Path, name: str, limits: Limits, series: str | None, gaps: bool) -> Volume:
    pydicom = _extra("pydicom")
    slices = _choose_series(_headers(pydicom, folder), name, series)
    first = slices[0][1]
    for path, header in slices:
        for field in ("Rows", "Columns", "ImageOrientationPatient", "PixelSpacing"):
            if header.get(field) != first.get(field):
                raise MediaError(
                    f"{path}: {field} is {header.get(field)}, in {slices[0][0].name} {first.get(field)};"
                    " a series holds slices of one geometry"
                )
    if int(getattr(first, "NumberOfFrames", 1) or 1) > 1:
        raise MediaError(f"{slices[0][0]}: holds several frames; export the series with one file per slice")
    voxels = len(slices) * int(first.Rows) * int(first.Columns)
    if voxels > limits.voxels:
        raise MediaError(f"{name}: has {voxels:,} voxels, the limit is {limits.voxels:,}")
    ordered, affine = _in_space(slices, name, gaps)
    data = np.empty((int(first.Columns), int(first.Rows), len(ordered)), np.float32)
    for index, path in enumerate(ordered):
        data[..., index] = _pixels(pydicom, path).T
    if affine is None:
        return Volume(data.transpose(2, 1, 0), None)
    return Volume(*_upright(data, affine))


def _headers(pydicom: Any, folder: Path) -> list[tuple[Path, Any]]:
    """Every DICOM image in a folder with its header; other files are passed over."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name.upper() != "DICOMDIR"):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except (pydicom.errors.InvalidDicomError, EOFError, OSError):
            if path.suffix.lower() in (".dcm", ".dicom", ".ima"):
                raise MediaError(f"{path}: is not a readable DICOM file; {looks_like(path)}") from None
            continue
        if "Rows" in header and "Columns" in header:
            found.append((path, header))
    return found


def _choose_series(headers: list[tuple[Path, Any]], name: str, series: str | None) -> list[tuple[Path, Any]]:
    if not headers:
        raise MediaError(f"{name}: the folder holds no DICOM images")
    by_series: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    for path, header in headers:
        by_series[str(header.get("SeriesInstanceUID", ""))].append((path, header))
    if series is not None and series not in by_series:
        raise MediaError(f"{name}: has no series {series!r}; it has {', '.join(by_series)}")
    if series is None and len(by_series) > 1:
        listed = "; ".join(f"{uid or 'without UID'}: {len(files)} slices" for uid, files in sorted(by_series.items()))
        raise MediaError(
            f"{name}: holds {len(by_series)} series ({listed}); give the one to read (reading.volume.series), or one"
            " folder each"
        )
    return by_series[series] if series is not None else next(iter(by_series.values()))


def _in_space(slices: list[tuple[Path, Any]], name: str, gaps: bool) -> tuple[list[Path], np.ndarray | None]:
    """Slices in order along their normal, and the affine of [column, row, slice] to RAS millimetres.

    Without positions the order is that of InstanceNumber and there is no affine.
    """
    placed = all("ImagePositionPatient" in h and "ImageOrientationPatient" in h for _, h in slices)
    if not placed:
        numbers = [header.get("InstanceNumber") for _, header in slices]
        if None in numbers or len(set(numbers)) != len(numbers):
            raise MediaError(f"{name}: its slices have neither positions nor distinct numbers, so no order")
        order = np.argsort([int(number) for number in numbers])
        return [slices[index][0] for index in order], None
    first = slices[0][1]
    row = np.array(first.ImageOrientationPatient[:3], float)  # direction in which columns count up
    column = np.array(first.ImageOrientationPatient[3:], float)
    normal = np.cross(row, column)
    places = np.array([np.array(header.ImagePositionPatient, float) @ normal for _, header in slices])
    order = np.argsort(places, kind="stable")
    steps = np.diff(places[order])
    if len(steps) and steps.min() < 1e-3:
        at = int(steps.argmin())
        twice = ", ".join(slices[order[index]][0].name for index in (at, at + 1))
        raise MediaError(f"{name}: two slices lie in one place ({twice}); a series holds every slice once")
    between = float(np.median(steps)) if len(steps) else float(first.get("SliceThickness") or 1.0)
    if len(steps) and not gaps and steps.max() > _GAP * between:
        at = int(steps.argmax())
        raise MediaError(
            f"{name}: slices are missing between {slices[order[at]][0].name} and {slices[order[at + 1]][0].name}"
            f" ({steps[at]:.2f} mm apart, the others {between:.2f} mm)"
        )
    down, across = (float(value) for value in first.get("PixelSpacing", (1.0, 1.0)))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * across, column * down, normal * between
    affine[:3, 3] = np.array(slices[order[0]][1].ImagePositionPatient, float)
    affine[:2] *= -1  # DICOM counts towards left and back, RAS towards right and front
    return [slices[index][0] for index in order], affine


def _pixels(pydicom: Any, path: Path) -> np.ndarray:
    """One slice [rows, columns] with its rescaling applied."""
    try:
        data = pydicom.dcmread(path)
        pixels = data.pixel_array.astype(np.float32)
    except Exception as error:
        raise MediaError(f"{path}: its pixels cannot be decoded ({reason(error)})") from None
    if pixels.ndim != 2:
        raise MediaError(f"{path}: has pixels of shape {pixels.shape}; a slice is one grey image")
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    return pixels * np.float32(slope) + np.float32(intercept)
