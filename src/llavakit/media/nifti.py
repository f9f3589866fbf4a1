"""Reading of NIfTI files (and of MGH, which nibabel reads alike).

nibabel reads headers; sizes that they announce are compared with limits and with the file before anything is
allocated, and values are converted as they are read.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.errors import MediaError, UserError, quoted
from llavakit.media.source import Limits, looks_like, reading, reason
from llavakit.media.volume import Volume, extra, kept_type, read_numbers, shape_of_volume, upright

_MOST_OFFSET = 16 * 2**20  # bytes in front of the voxels; nibabel reads them all, and gzip makes zeros of nearly none
_MOST_DEFLATED = 1032  # bytes that one byte of gzip can become
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by code: unknown (taken as is), metres, millimetres, micrometres
_SAME_SIZE = 0.01  # relative difference of voxel sizes from which sform and qform disagree


def load_nifti(
    file: Path | bytes | bytearray | memoryview,
    name: str,
    limits: Limits,
    *,
    orientation: str | None = None,
    choice: str | None = None,
    keep_integers: bool = False,
) -> Volume:
    """A NIfTI file as a volume, see `llavakit.media.volume.load_volume`.

    Args:
        choice: "sform" or "qform" if the two disagree.

    Raises:
        MediaError: If it is none, damaged, ambiguous, or breaks a limit.
    """
    nibabel = extra("nibabel")
    if choice not in (None, "sform", "qform"):
        raise UserError(f"affine: must be sform or qform, not {quoted(choice)}")

    def unread(error: Exception) -> str:
        return f"is not a readable NIfTI file ({reason(error)}); {looks_like(file)}"

    with reading(name, unread):
        image = _header(nibabel, file)
    shape, dtype = tuple(map(int, image.shape)), image.dataobj.dtype
    if dtype.kind in "Vc":
        what = "colours (RGB)" if dtype.kind == "V" else "complex values"
        raise MediaError(f"{name}: holds {what}; a volume holds one real number per voxel")
    if len(shape) == 4 and shape[3] > 1:
        raise MediaError(f"{name}: has shape {shape}, {shape[3]} volumes; split it and give one volume of three axes")
    while len(shape) > 3 and shape[-1] == 1:  # the first three axes are those of space, however long
        shape = shape[:-1]
    axes = shape_of_volume(shape, dtype, name, limits)
    affine = _affine(image, name, orientation, choice)
    values = _values(image, file, name, axes, keep_integers)
    return upright(values.reshape(axes, order=image.dataobj.order), affine)


def _header(nibabel: Any, file: Any) -> Any:
    """The image with its header read."""
    if isinstance(file, Path):
        with gzip.open(file) if file.suffix in (".gz", ".mgz") else file.open("rb") as stream:
            _check_offset(stream.read(540))
        return nibabel.load(file)
    content = io.BytesIO(file)
    stream = gzip.GzipFile(fileobj=content) if bytes(file[:2]) == b"\x1f\x8b" else content
    head = stream.read(540)
    _check_offset(head)
    stream.seek(0)
    kind = nibabel.Nifti2Image if head[:4] in (struct.pack("<i", 540), struct.pack(">i", 540)) else nibabel.Nifti1Image
    return kind.from_stream(stream)


def _check_offset(head: bytes) -> None:
    """Refuse a header by which the voxels begin far behind it."""
    for order in "<>":
        size = struct.unpack_from(f"{order}i", head.ljust(4, b"\0"))[0]
        offset = 0
        if size == 348 <= len(head):
            offset = struct.unpack_from(f"{order}f", head, 108)[0]
        elif size == 540 <= len(head):
            offset = struct.unpack_from(f"{order}q", head, 168)[0]
        if not offset <= _MOST_OFFSET:
            raise ValueError(f"its voxels begin at byte {offset:,.0f}, the limit is {_MOST_OFFSET:,}")


def _values(image: Any, file: Any, name: str, axes: tuple[int, int, int], keep_integers: bool) -> np.ndarray:
    """All values in the order of the file, rescaled as it states."""
    from nibabel.volumeutils import apply_read_scaling

    proxy = image.dataobj
    count, dtype = axes[0] * axes[1] * axes[2], proxy.dtype
    plain = (proxy.slope, proxy.inter) == (1, 0)
    with (
        image.file_map["image"].get_prepare_fileobj("rb") as stream,
        reading(name, "is cut off or damaged", "copy it again"),
    ):
        there = _most_bytes(image, file)
        if proxy.offset + count * dtype.itemsize > there:
            raise EOFError(
                f"{proxy.offset + count * dtype.itemsize:,} bytes are announced, at most {there:,} are there"
            )
        stream.seek(proxy.offset)
        return read_numbers(
            stream,
            count,
            dtype,
            kept_type(dtype, keep_integers and plain),
            lambda values: values if plain else apply_read_scaling(values, proxy.slope, proxy.inter),
        )


def _most_bytes(image: Any, file: Any) -> int:
    """How many bytes the file with the voxels can hold at most."""
    if not isinstance(file, Path):
        packed, size = bytes(file[:2]) == b"\x1f\x8b", len(file)
    else:
        path = os.fspath(image.file_map["image"].filename)
        packed, size = path.lower().endswith((".gz", ".mgz", ".bz2", ".zst")), os.path.getsize(path)
    return size * _MOST_DEFLATED if packed else size


def _affine(image: Any, name: str, orientation: str | None, choice: str | None) -> np.ndarray:
    """From voxel indices to millimetres towards right, front and head [4, 4]."""
    header = image.header
    if not hasattr(header, "get_sform"):
        if "sizeof_hdr" in header:  # Analyze, which has no directions; nibabel would guess them
            return _by_letters(header, name, orientation, 1.0)
        return _checked(image.affine, name, "affine")
    code = int(header["xyzt_units"]) & 7
    if code not in _MILLIMETRES:
        raise MediaError(f"{name}: its unit of length has the code {code} (xyzt_units), which NIfTI does not define")
    unit = _MILLIMETRES[code]
    found = {}
    for which in ("sform", "qform"):
        if header[f"{which}_code"] > 0:
            with reading(name, f"its {which} is damaged"):
                affine = np.array(getattr(header, f"get_{which}")(), dtype=np.float64)
            affine[:3] *= unit
            found[which] = affine
    if not found:
        return _by_letters(header, name, orientation, unit)
    if choice is not None and choice not in found:
        raise MediaError(f"{name}: states no {choice} (its code is 0), only a {next(iter(found))}")
    if choice is None and len(found) == 2:
        _refuse_disagreement(found, name)
    which = choice or next(iter(found))
    return _checked(found[which], name, which)


def _checked(affine: Any, name: str, which: str) -> np.ndarray:
    affine = np.asarray(affine, dtype=np.float64)
    with np.errstate(all="ignore"):
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        good = np.isfinite([*affine.flat, *sizes]).all() and sizes.min() > 0
        good = good and abs(np.linalg.det(affine[:3, :3] / sizes)) >= 1e-6
    if not good:
        raise MediaError(f"{name}: its {which} is singular or not finite, so its axes have no directions")
    return affine


def _refuse_disagreement(found: dict[str, np.ndarray], name: str) -> None:
    """Refuse a file whose two affines put it into the patient in different ways; which one readers take differs."""
    orientations = extra("nibabel.orientations")
    described = {}
    for which, affine in found.items():
        sizes = np.linalg.norm(_checked(affine, name, which)[:3, :3], axis=0)
        described[which] = ("".join(orientations.aff2axcodes(affine)), sizes)
    (axes, sizes), (other_axes, other_sizes) = described["sform"], described["qform"]
    if axes == other_axes and np.allclose(sizes, other_sizes, rtol=_SAME_SIZE):
        return
    texts = [f"{code} with {' x '.join(f'{size:.4g}' for size in own)} mm" for code, own in described.values()]
    raise MediaError(
        f"{name}: its sform and qform disagree ({texts[0]} and {texts[1]}), so readers differ, as in what is left and"
        " right; say which one holds (reading.volume.affine=sform or qform)"
    )


def _by_letters(header: Any, name: str, orientation: str | None, unit: float) -> np.ndarray:
    """The affine of a file that states none, from the user's letters for its axes."""
    if orientation is None:
        raise MediaError(
            f"{name}: does not say how its axes lie in the patient (sform and qform codes are 0);"
            " give the orientation, for example RAS (reading.volume.orientation)"
        )
    orientations = extra("nibabel.orientations")
    try:
        axes = orientations.axcodes2ornt(tuple(orientation.upper()))
    except (ValueError, KeyError, AttributeError):
        axes = np.full((3, 2), np.nan)
    if axes.shape != (3, 2) or np.isnan(axes).any() or len(set(axes[:, 0])) != 3:
        raise UserError(f"orientation: {quoted(orientation)} is none; write one letter per axis, for example 'RAS'")
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, ((row, sign), size) in enumerate(zip(axes, header.get_zooms()[:3], strict=True)):
        affine[int(row), axis] = sign * float(size) * unit
    return _checked(affine, name, "voxel size (pixdim)")
