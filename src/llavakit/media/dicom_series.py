"""Reading of a folder with one DICOM series as a volume."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.errors import MediaError, quoted, shorten
from llavakit.media import dicom
from llavakit.media.source import VOXEL_BYTES, Limits, is_dicom, looks_like, reading
from llavakit.media.volume import Volume, extra, upright

_GAP = 1.5  # distance of neighbouring slices, in median distances, from which one counts as missing
_TOLERANCE = 1e-4  # of direction cosines and of spacings in mm; scanners write them with rounding errors
_DRIFT = 0.1  # pixels by which slices may be shifted against each other before they are brought into line
_MOST_FILES = 100_000
_FIELDS = ("SeriesInstanceUID", "InstanceNumber", "Rows", "Columns", "NumberOfFrames", "SliceThickness", "PixelSpacing")
_FIELDS += ("ImageOrientationPatient", "ImagePositionPatient")  # what is kept of every header
_SUFFIXES = (".dcm", ".dicom", ".ima")

Slices = list[tuple[Path, Any]]


def load_series(folder: Path, name: str, limits: Limits, *, series: str | None = None, gaps: bool = False) -> Volume:
    """A DICOM series as a volume, see `llavakit.media.volume.load_volume`.

    Slices are ordered along their normal. Where the scanner was tilted (CT of the head), each slice is shifted in its
    plane against the one before; they are brought into line, by linear interpolation within the slice. Padding, and
    what such a shift leaves empty, becomes the lowest value of the volume.

    Raises:
        MediaError: If the folder holds no series, several, or one that is no volume.
    """
    extra("pydicom"), extra("nibabel")  # what is missing is said before files are read
    slices = _choose_series(_headers(folder), name, series)
    _check_geometry(slices, limits)
    rows, columns = dicom.check_size(slices[0][1], str(slices[0][0]), limits)
    ordered, affine, shifts = _in_space(slices, name, gaps)
    room = np.zeros(2, int) if shifts is None else np.ceil(shifts.max(axis=0) - 1e-6).astype(int)
    height, width = rows + int(room[0]), columns + int(room[1])
    if height > 2 * rows or width > 2 * columns:
        raise MediaError(f"{name}: its slices lie beside each other, shifted by up to {room.max()} pixels; no volume")
    if len(slices) * height * width > limits.voxels:
        raise MediaError(f"{name}: has {len(slices) * height * width:,} voxels, the limit is {limits.voxels:,}")
    limits.claim(name, len(slices) * height * width * VOXEL_BYTES)
    values = np.empty((len(ordered), height, width), np.float32)
    for index, path in enumerate(ordered):
        pixels = _slice(path, limits)
        values[index] = pixels if shifts is None else _shifted(pixels, shifts[index], (height, width))
    _fill_padding(values, name)
    if affine is None:
        return Volume(values, None)
    return upright(values.transpose(2, 1, 0), affine)


def _headers(folder: Path) -> Slices:
    """Every DICOM image in a folder and the folders in it, with its header; other files are passed over."""
    found, seen = [], 0
    with reading(str(folder), "cannot be listed"):
        paths = sorted(Path(place, file) for place, _, files in os.walk(folder) for file in files)
    for path in paths:
        if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
            continue
        seen += 1
        if seen > _MOST_FILES:
            raise MediaError(f"{folder}: holds more than {_MOST_FILES:,} files; give the folder of one series")
        if not is_dicom(path):
            if path.suffix.lower() in _SUFFIXES:
                raise MediaError(f"{path}: is not a readable DICOM file; {looks_like(path)}")
            continue
        header = dicom.read_dataset(path, str(path), pixels=False, fields=_FIELDS)
        if "Rows" in header and "Columns" in header:
            found.append((path, header))
    return found


def _choose_series(headers: Slices, name: str, series: str | None) -> Slices:
    if not headers:
        raise MediaError(f"{name}: the folder holds no DICOM images")
    by_series: dict[str, Slices] = defaultdict(list)
    for path, header in headers:
        with dicom.discreet(str(path), "its SeriesInstanceUID is damaged"):
            by_series[str(header.get("SeriesInstanceUID", ""))].append((path, header))
    if series is not None and series not in by_series:
        raise MediaError(f"{name}: has no series {quoted(series)}; it has {shorten(', '.join(by_series))}")
    if series is None and len(by_series) > 1:
        listed = "; ".join(
            f"{shorten(uid) or 'without UID'}: {len(files)} slices" for uid, files in sorted(by_series.items())[:20]
        )
        raise MediaError(
            f"{name}: holds {len(by_series)} series ({listed}); give the one to read (reading.volume.series), or one"
            " folder each"
        )
    return by_series[series] if series is not None else next(iter(by_series.values()))


def _numbers(path: Path, header: Any, field: str, count: int) -> np.ndarray | None:
    """A field of several numbers [count], None if it is not there."""
    with dicom.discreet(str(path), f"its {field} is damaged"):
        value = header.get(field)
        if value is None or value == "":
            return None
        numbers = np.array(value, dtype=np.float64)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise MediaError(f"{path}: its {field} is damaged; it should be {count} numbers")
    return numbers


def _check_geometry(slices: Slices, limits: Limits) -> None:
    """Refuse slices that differ in size, direction or spacing, beyond rounding."""
    first_path, first = slices[0]
    for path, header in slices:
        for field in ("Rows", "Columns"):
            own, other = (
                dicom.whole_number(data, field, str(where)) for where, data in ((path, header), (first_path, first))
            )
            if own != other:
                _refuse_geometry(path, field, own, first_path, other)
        for field, count in (("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
            own, other = _numbers(path, header, field, count), _numbers(first_path, first, field, count)
            if (own is None) != (other is None) or (own is not None and not np.allclose(own, other, 0, _TOLERANCE)):
                texts = ("missing" if value is None else value.tolist() for value in (own, other))
                _refuse_geometry(path, field, next(texts), first_path, next(texts))
    if dicom.whole_number(first, "NumberOfFrames", str(first_path), 1) > 1:
        raise MediaError(f"{first_path}: holds several frames; export the series with one file per slice")


def _refuse_geometry(path: Path, field: str, own: Any, first_path: Path, other: Any) -> None:
    raise MediaError(f"{path}: {field} is {own}, in {first_path.name} {other}; a series holds slices of one geometry")


def _in_space(slices: Slices, name: str, gaps: bool) -> tuple[list[Path], np.ndarray | None, np.ndarray | None]:
    """Slices in order along their normal; the affine of [column, row, slice] to RAS millimetres; shifts in the plane.

    Without any positions the order is that of InstanceNumber and there is no affine.

    Returns:
        Paths; affine [4, 4] or None; pixels by which every slice is shifted down and to the right [slices, 2], None if
        they lie straight above each other.
    """
    positions = [_numbers(path, header, "ImagePositionPatient", 3) for path, header in slices]
    directions = _numbers(*slices[0], "ImageOrientationPatient", 6)
    missing = [path for (path, _), position in zip(slices, positions, strict=True) if position is None]
    if len(missing) == len(slices) or directions is None:
        return _by_number(slices, name), None, None
    if missing:
        raise MediaError(
            f"{missing[0]}: has no position (ImagePositionPatient), {len(slices) - len(missing)} other slices of its"
            " series have; take it out of the folder if it is not part of the volume"
        )
    row, column = directions[:3], directions[3:]  # the directions in which columns and rows count up
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-2):
        raise MediaError(f"{slices[0][0]}: its ImageOrientationPatient is damaged; it should be two directions")
    normal = np.cross(row, column)
    placed = np.array(positions)
    places = placed @ normal
    order = np.argsort(places, kind="stable")
    between = _check_steps(slices, places, order, name, gaps)
    spacing = _numbers(*slices[0], "PixelSpacing", 2)
    down, across = (1.0, 1.0) if spacing is None else spacing
    if not min(down, across, between) > 0:
        raise MediaError(f"{slices[0][0]}: its PixelSpacing or SliceThickness is not positive")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * across, column * down, normal * between
    affine[:3, 3] = placed[order[0]]
    affine[:2] *= -1  # DICOM counts towards left and back, RAS towards right and front
    shifts = np.stack([placed @ column / down, placed @ row / across], axis=1)[order]
    shifts -= shifts.min(axis=0)
    return [slices[index][0] for index in order], affine, shifts if shifts.max() > _DRIFT else None


def _by_number(slices: Slices, name: str) -> list[Path]:
    numbers = []
    for path, header in slices:
        with dicom.discreet(str(path), "its InstanceNumber is damaged"):
            value = header.get("InstanceNumber")
            numbers.append(None if value is None or value == "" else int(value))
    if None in numbers or len(set(numbers)) != len(numbers):
        raise MediaError(f"{name}: its slices have neither positions nor distinct numbers, so no order")
    return [slices[index][0] for index in np.argsort(numbers)]


def _check_steps(slices: Slices, places: np.ndarray, order: np.ndarray, name: str, gaps: bool) -> float:
    """The distance of neighbouring slices in mm; refuses a slice that is there twice or missing."""
    steps = np.diff(places[order])
    if not len(steps):
        thickness = dicom.number(slices[0][1], "SliceThickness", str(slices[0][0]), 1.0)
        return thickness
    if steps.min() < 1e-3:
        at = int(steps.argmin())
        twice = ", ".join(slices[order[index]][0].name for index in (at, at + 1))
        raise MediaError(f"{name}: two slices lie in one place ({twice}); a series holds every slice once")
    between = float(np.sort(steps)[(len(steps) - 1) // 2])  # of two steps the shorter: the other may be a gap
    if not gaps and steps.max() > _GAP * between:
        at = int(steps.argmax())
        raise MediaError(
            f"{name}: slices are missing between {slices[order[at]][0].name} and {slices[order[at + 1]][0].name}"
            f" ({steps[at]:.2f} mm apart, the others {between:.2f} mm)"
        )
    return between


def _slice(path: Path, limits: Limits) -> np.ndarray:
    """What one slice measures, float32 [rows, columns]; padding is NaN."""
    name = str(path)
    dataset = dicom.read_dataset(path, name)
    stored = dicom.stored_pixels(dataset, name, limits)
    if stored.ndim != 2:
        raise MediaError(f"{name}: has pixels of shape {stored.shape}; a slice is one grey image")
    values = dicom.measured(dataset, stored, name)
    padding = dicom.padding_of(dataset, stored, name)
    if padding is not None:
        values[padding] = np.nan
    return values


def _fill_padding(values: np.ndarray, name: str) -> None:
    """Give padding (NaN) the lowest value of the volume, in place."""
    lowest = min((float(np.nanmin(part)) for part in values if not np.isnan(part).all()), default=None)
    if lowest is None:
        raise MediaError(f"{name}: all its pixels are padding")
    for part in values:
        part[np.isnan(part)] = lowest


def _shifted(pixels: np.ndarray, shift: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A slice shifted down and to the right by parts of pixels; NaN where there is nothing."""
    for axis in (0, 1):
        whole = int(np.floor(shift[axis] + 1e-6))
        part = max(float(shift[axis]) - whole, 0.0)
        shape = list(pixels.shape)
        shape[axis] = size[axis] + 1
        moved = np.full(shape, np.nan, np.float32)
        along = np.moveaxis(moved, axis, 0)
        along[whole : whole + pixels.shape[axis]] = np.moveaxis(pixels, axis, 0)
        if part > 1e-3:
            before = along[:-1].copy()
            along[1:] = (1 - part) * along[1:] + part * before
        pixels = np.moveaxis(along[: size[axis]], 0, axis)
    return pixels
