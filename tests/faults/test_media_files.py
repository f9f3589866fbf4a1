"""Malformed media: damaged pictures, videos, volumes and DICOM files, and headers that announce what is not there.

Each is read and asked for its size. It may succeed or be refused in one line; what it takes in memory is bounded by the
limits, whatever its header says.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from harness import Faults
from mutations import scramble
from PIL import Image

from llavakit.media import Limits, image_size, load_image, load_video, load_volume

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

LIMITS = Limits(pixels=2**20, file_bytes=2**20, frames=32, video_pixels=2**21, video_frames=2000, voxels=2**20)
MOST_MEMORY = 192 * 2**20  # over what is held before; pictures and volumes within the limits take some 40 MB
WIDE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def resident() -> int:
    """Highest resident memory of this process so far in bytes; 0 where nothing says it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """No test of this file makes the process grow by more than the limits explain."""
    before = resident()
    yield
    assert resident() - before < MOST_MEMORY


def announced(content: bytes, rng: random.Random) -> bytes:
    """The file with numbers of its header replaced by extreme ones, in either order of bytes."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place, form = rng.randrange(min(len(out) - 8, 1024)), rng.choice("HIIQ")
        value = rng.choice(WIDE)
        struct.pack_into(rng.choice("<>") + form, out, place, value & 0xFFFF if form == "H" else value)
    return bytes(out)


def damaged(content: bytes, number: int) -> bytes:
    """One of the damaged forms of a file, by number."""
    rng = random.Random(number)
    return announced(content, rng) if number % 3 == 0 else scramble(content, rng)


def attempts(faults: Faults, kind: str, content: bytes, count: int, *calls: Callable[[bytes], Any]) -> None:
    """Give `count` damaged forms of a file to every call."""
    for number in range(count):
        broken = damaged(content, number)
        for call in calls:
            faults.attempt(kind, f"seed {number}", partial(call, broken))


# Pictures


def picture(form: str, mode: str = "RGB", **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    values[:, 8:] //= 64  # something to compress
    image = Image.fromarray(values).convert("RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, form, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF") else {}), **options)
    return stream.getvalue()


PICTURES = {
    "PNG": picture("PNG"),
    "PNG, 16 bits": picture("PNG", "I;16"),
    "PNG, palette": picture("PNG", "P", transparency=0),
    "JPEG": picture("JPEG"),
    "JPEG, progressive": picture("JPEG", progressive=True),
    "JPEG, CMYK": picture("JPEG", "CMYK"),
    "TIFF": picture("TIFF"),
    "TIFF, 16 bits, LZW": picture("TIFF", "I;16", compression="tiff_lzw"),
    "TIFF, JPEG": picture("TIFF", compression="jpeg"),
    "WebP": picture("WEBP"),
    "WebP, lossless": picture("WEBP", "RGBA", lossless=True),
    "GIF": picture("GIF", "P"),
    "BMP": picture("BMP"),
    "ICO": picture("ICO", "RGBA", sizes=[(16, 16)]),
    "TGA": picture("TGA"),
    "PPM": picture("PPM"),
    "JPEG 2000": picture("JPEG2000"),
    "AVIF": picture("AVIF"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(faults: Faults, kind: str) -> None:
    size, load = partial(image_size, limits=LIMITS), partial(load_image, limits=LIMITS)
    attempts(faults, "pictures", PICTURES[kind], 200, size, load)


# Videos


def video(folder: Path, form: str, codec: str, **options: Any) -> bytes:
    path = folder / "a.video"
    with av.open(str(path), "w", format=form, **options) as container:
        track = container.add_stream(codec, rate=10)
        track.width, track.height = 32, 24
        track.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        track.gop_size = 4
        for index in range(10):
            pixels = np.full((24, 32, 3), index * 20, np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())
    return path.read_bytes()


VIDEOS = {
    "MP4": ("mp4", "mpeg4", {}),
    "MP4, index first": ("mp4", "mpeg4", {"options": {"movflags": "faststart"}}),
    "MP4, fragments": ("mp4", "mpeg4", {"options": {"movflags": "frag_keyframe+empty_moov"}}),
    "Matroska": ("matroska", "mpeg4", {}),
    "AVI": ("avi", "mpeg4", {}),
    "MPEG-TS": ("mpegts", "mpeg2video", {}),
    "raw MPEG-2": ("mpeg2video", "mpeg2video", {}),
    "GIF": ("gif", "gif", {}),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_videos(faults: Faults, tmp_path: Path, kind: str) -> None:
    form, codec, options = VIDEOS[kind]
    rate = partial(load_video, sampling={"type": "rate", "fps": 5}, limits=LIMITS)
    whole = partial(load_video, sampling={"type": "all"}, limits=LIMITS, partial=True)
    attempts(faults, "videos", video(tmp_path, form, codec, **options), 80, rate, whole)


def test_mp4_tables(faults: Faults, tmp_path: Path) -> None:
    """Every number of the boxes that describe samples, made extreme one by one."""
    rate = partial(load_video, sampling={"type": "rate", "fps": 30}, limits=LIMITS)
    for form in ("MP4", "MP4, fragments"):
        container, codec, options = VIDEOS[form]
        content = video(tmp_path, container, codec, **options)
        for box in (b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"elst", b"mvhd", b"mdhd", b"tkhd", b"trun", b"tfhd",
                    b"trex", b"tfdt", b"sidx", b"avcC", b"esds", b"mp4v"):  # fmt: skip
            at = content.find(box)
            for offset in range(0, 36, 4) if at >= 0 else ():
                for value in (0, 1, 0xFFFF, 10**6, 0x7FFFFFFF, 0xFFFFFFFF):
                    broken = bytearray(content)
                    struct.pack_into(">I", broken, at + 4 + offset, value)
                    label = f"{box.decode()}+{offset}={value:#x} in {form}"
                    faults.attempt("MP4 tables", label, partial(rate, bytes(broken)))


# Volumes


def nifti(kind: type, dtype: str) -> bytes:
    values = np.arange(8 * 7 * 6).reshape(8, 7, 6).astype(dtype)
    return kind(values, np.diag([-1.0, -1.0, 2.0, 1.0])).to_bytes()


def npy(version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.arange(8 * 7 * 6, dtype=np.float32).reshape(8, 7, 6), version)
    return stream.getvalue()


VOLUMES = {
    "NIfTI-1": nifti(nibabel.Nifti1Image, "int16"),
    "NIfTI-1, float64": nifti(nibabel.Nifti1Image, "float64"),
    "NIfTI-2": nifti(nibabel.Nifti2Image, "uint8"),
    "NIfTI-1, gzip": gzip.compress(nifti(nibabel.Nifti1Image, "int16")),
    "npy 1.0": npy(),
    "npy 2.0": npy((2, 0)),
}


@pytest.mark.parametrize("kind", VOLUMES)
def test_volumes(faults: Faults, kind: str) -> None:
    attempts(faults, "volumes", VOLUMES[kind], 300, partial(load_volume, limits=LIMITS))
    if kind.endswith("gzip"):  # damage inside
        inner = gzip.decompress(VOLUMES[kind])
        packed = [gzip.compress(damaged(inner, number)) for number in range(200)]
        for number, content in enumerate(packed):
            faults.attempt("volumes", f"inner seed {number}", partial(load_volume, content, limits=LIMITS, fill=0.0))


def test_nifti_fields(faults: Faults) -> None:
    """Every field of a header, made extreme one by one."""
    content = VOLUMES["NIfTI-1"]
    header = nibabel.Nifti1Header().structarr.dtype
    for field, (dtype, offset, *_) in header.fields.items():
        base = dtype.subdtype[0] if dtype.subdtype else dtype
        if base.kind not in "iuf":
            continue
        extremes = (np.nan, np.inf, -1, 0, 1e30) if base.kind == "f" else (np.iinfo(base).max, np.iinfo(base).min, 0, 7)
        for place in range(dtype.itemsize // base.itemsize):
            for value in extremes:
                broken = bytearray(content)
                at = offset + place * base.itemsize
                broken[at : at + base.itemsize] = np.array(value, base).tobytes()
                label = f"{field}[{place}] = {value}"
                faults.attempt("NIfTI fields", label, partial(load_volume, bytes(broken), limits=LIMITS, fill=0.0))


def test_npy_shapes(faults: Faults) -> None:
    extreme = ("(1000000, 1000000, 1000000)", "(9223372036854775807, 2, 2)", "(-1, 2, 3)", "(1e9, 2, 2)")
    odd = ("(True, 2, 3)", "(3,)", "()", "(2, 3, 4", "[2, 3, 4]", "('a', 2, 2)", "(10, 1000, 100)", "(0, 2, 3)")
    for shape in (*extreme, *odd):
        for dtype in ("'<f4'", "'|O'", "'<U1000000000'", "'<M8[s]'", "'<c16'", "'>i2'", "[('a', '<f4')]", "'|V9'", "1"):
            header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
            content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(96)
            faults.attempt("npy headers", f"{shape} of {dtype}", partial(load_volume, content, limits=LIMITS))


# DICOM


def dicom(**fields: Any) -> bytes:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = fields.pop("syntax", ExplicitVRLittleEndian)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.PatientName, data.SeriesInstanceUID, data.InstanceNumber = "DOE^JANE", "1.2", 1
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 12, 16, 1, "MONOCHROME1"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept, data.WindowCenter, data.WindowWidth = 1, -1024, 40, 400
    data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 1]
    data.PixelSpacing = [1, 1]
    data.PixelData = np.arange(12 * 16, dtype="<u2").tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def test_dicom_pictures(faults: Faults) -> None:
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit

    grey = io.BytesIO()
    Image.new("L", (16, 12), 9).save(grey, "JPEG")
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    compressed = dicom(syntax=JPEGBaseline8Bit, PixelData=encapsulate([grey.getvalue()]), **eight)
    size, load = partial(image_size, limits=LIMITS), partial(load_image, limits=LIMITS)
    for kind, content in (("plain", dicom()), ("JPEG inside", compressed)):
        for number in range(250):
            rng = random.Random(number)
            broken = content[:132] + damaged(content[132:], number) if rng.random() < 0.8 else damaged(content, number)
            for call in (size, load):
                raised = faults.attempt("DICOM pictures", f"{kind}, seed {number}", partial(call, broken))
                assert "JANE" not in str(raised)


def test_dicom_series(faults: Faults, tmp_path: Path) -> None:
    for index in range(3):
        content = dicom(ImagePositionPatient=[0, 0, float(index)], InstanceNumber=index + 1)
        (tmp_path / f"{index}.dcm").write_bytes(content)
    middle = (tmp_path / "1.dcm").read_bytes()
    for number in range(250):
        (tmp_path / "1.dcm").write_bytes(middle[:132] + damaged(middle[132:], number))
        raised = faults.attempt("DICOM series", f"seed {number}", partial(load_volume, tmp_path, limits=LIMITS))
        assert "JANE" not in str(raised)
