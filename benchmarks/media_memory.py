"""Peak memory of reading the largest media that a server accepts, over their decoded size.

    python benchmarks/media_memory.py [--scale 1.0] [--only TEXT]

Each file is made and read in a process of its own. Decoded size is that of the picture or volume as its file stores it
(2 bytes per pixel of 16-bit grey, 3 of RGB, 1 per voxel of uint8) plus the views that an encoder gets; peak is the
highest resident memory while it is read and cut, less what the process held before. The limits are those of
`llavakit serve` (50 million pixels, 2^27 voxels); `--scale 0.1` tries a tenth of both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PIXELS, VOXELS = 50_000_000, 2**27
TARGET = 3.0
PAD = {"type": "pad", "size": 336}
ANYRES = {"type": "anyres", "size": 336}
SQUARE = {"type": "square", "size": 336}
BOX = {"type": "volume_box"}
SLICES = {"type": "volume_slices"}


def gradient(shape: tuple[int, ...], dtype: str) -> object:
    """Smooth content that compresses quickly."""
    import numpy as np

    line = np.arange(shape[1]) // 8
    top = 255 if dtype == "uint8" else 4095
    pixels = np.empty(shape, dtype)
    for row in range(shape[0]):
        values = (line + row // 4) % (top + 1)
        pixels[row] = values if len(shape) == 2 else values[:, None]
    return pixels


def image(mode: str, *, share: float = 1.0, **options: object) -> Callable[[Path, float], None]:
    """A maker of pictures at the pixel limit; `wide` ones are as wide as is allowed.

    Args:
        share: Of the pixel limit, for formats whose decoders need more memory.
    """

    def make(path: Path, scale: float) -> None:
        from PIL import Image

        wide = options.get("wide")
        pixels = PIXELS * scale * share
        height = int(pixels) // 60_000 if wide else int(pixels**0.5)
        width = 60_000 if wide else height
        Image.MAX_IMAGE_PIXELS = None
        dtype = {"I;16": "uint16", "F": "float32"}.get(mode, "uint8")
        shape = (height, width) if mode in ("I;16", "F", "L", "P") else (height, width, len(mode.rstrip(";")))
        picture = Image.fromarray(gradient(shape, dtype), mode=None if mode != "CMYK" else "CMYK")
        if mode == "P":
            picture = picture.convert("P")
        picture.save(path, **{key: value for key, value in options.items() if key != "wide"})

    return make


def dicom_picture(path: Path, scale: float) -> None:
    side = int((PIXELS * scale) ** 0.5)
    _dicom(gradient((side, side), "uint16"), path, 0)


def _dicom(pixels: object, path: Path, index: int) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SeriesInstanceUID = "1.2.3"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelSpacing, data.ImageOrientationPatient = [0.7, 0.7], [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [0.0, 0.0, float(index)]
    data.WindowCenter, data.WindowWidth = 1000, 2000
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)


def series(path: Path, scale: float) -> None:
    path.mkdir()
    pixels = gradient((512, 512), "uint16")
    for index in range(max(1, int(VOXELS * scale) // 512**2)):
        _dicom(pixels, path / f"{index:04}.dcm", index)


def nifti(dtype: str, axes: str = "RAS") -> Callable[[Path, float], None]:
    """A maker of volumes of 512 x 512 at the voxel limit, whose axes run as the letters say."""

    def make(path: Path, scale: float) -> None:
        import nibabel
        import numpy as np

        depth = max(1, int(VOXELS * scale) // 512**2)
        values = np.empty((512, 512, depth), dtype, order="F")
        for index in range(depth):
            values[..., index] = gradient((512, 512), dtype) * (1 if dtype == "uint8" else 16) - (
                0 if dtype == "uint8" else 1024
            )
        rotation = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(axes), values.shape)
        nibabel.save(nibabel.Nifti1Image(values, rotation), path)

    return make


def npy(dtype: str) -> Callable[[Path, float], None]:
    def make(path: Path, scale: float) -> None:
        import numpy as np

        depth = max(1, int(VOXELS * scale) // 512**2)
        np.save(path, np.broadcast_to(gradient((512, 512), dtype), (depth, 512, 512)))

    return make


# name, ending, maker, planner, bytes per pixel or voxel as stored
CASES = {
    "16-bit grey PNG": ("png", image("I;16", compress_level=1), PAD, 2),
    "16-bit grey TIFF": ("tif", image("I;16"), PAD, 2),
    "16-bit grey TIFF, deflated": ("tif", image("I;16", compression="tiff_deflate"), PAD, 2),
    "float TIFF": ("tif", image("F"), PAD, 4),
    "16-bit DICOM with a window": ("dcm", dicom_picture, PAD, 2),
    "RGB JPEG": ("jpg", image("RGB"), PAD, 3),
    "RGB JPEG, progressive": ("jpg", image("RGB", share=0.9, progressive=True), PAD, 3),
    "RGB JPEG, anyres": ("jpg", image("RGB"), ANYRES, 3),
    "RGB JPEG, 60,000 wide": ("jpg", image("RGB", wide=True), PAD, 3),
    "RGB JPEG, 60,000 wide, cropped": ("jpg", image("RGB", wide=True), SQUARE, 3),
    "CMYK JPEG": ("jpg", image("CMYK"), PAD, 4),
    "RGB PNG": ("png", image("RGB", compress_level=1), PAD, 3),
    "RGBA PNG": ("png", image("RGBA", compress_level=1), PAD, 4),
    "palette PNG, transparent": ("png", image("P", compress_level=1, transparency=3), PAD, 3),
    "lossy WebP": ("webp", image("RGB", share=9 / 16, method=0), PAD, 3),
    "int16 NIfTI": ("nii", nifti("int16"), BOX, 2),
    "int16 NIfTI, sagittal": ("nii", nifti("int16", "PSR"), BOX, 2),
    "int16 NIfTI, gzip, as slices": ("nii.gz", nifti("int16"), SLICES, 2),
    "uint8 NIfTI": ("nii", nifti("uint8"), BOX, 1),
    "int16 .npy": ("npy", npy("int16"), BOX, 2),
    "float32 .npy": ("npy", npy("float32"), BOX, 4),
    "DICOM series": ("", series, BOX, 2),
}


def held() -> int:
    """Highest resident memory of this process so far in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this script needs /proc (Linux)")


def read(name: str, path: Path) -> dict[str, float]:
    """Read and cut one file; sizes in bytes."""
    import numpy as np
    from PIL import Image

    from llavakit.media import load_image, load_volume
    from llavakit.media.source import Limits, MediaSize
    from llavakit.registry import PLANNERS
    from llavakit.system import systems

    systems()
    _, _, planner, width = CASES[name]
    planner = PLANNERS.build(dict(planner))
    limits = Limits(pixels=PIXELS, voxels=VOXELS)
    small = MediaSize(1, 400, 500) if planner.modality == "image" else MediaSize(20, 30, 40)
    item = (
        Image.new("RGB", (500, 400))
        if planner.modality == "image"
        else np.arange(24_000, dtype=np.float32).reshape(small)
    )
    planner.cut(item, planner.plan(small))  # what starts on first use
    before = held()
    if planner.modality == "image":
        item = load_image(path, limits=limits)
        size = MediaSize(1, item.height, item.width)
    else:
        item = load_volume(path, limits=limits, keep_integers=True).values
        size = MediaSize(*item.shape)
    loaded = held()
    views = planner.cut(item, planner.plan(size))
    decoded = size.depth * size.height * size.width * width + sum(view.nbytes for view in views)
    return {"decoded": decoded, "loaded": loaded - before, "peak": held() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the limits")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--make", nargs=2, metavar=("CASE", "PATH"), help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs=2, metavar=("CASE", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        CASES[options.make[0]][1](Path(options.make[1]), options.scale)
        return
    if options.read:
        print(json.dumps(read(options.read[0], Path(options.read[1]))))
        return
    print("| | decoded MB | peak while loading | peak with views | over decoded |\n|---|---|---|---|---|")
    worst = 0.0
    for name, (ending, *_) in CASES.items():
        if options.only.lower() not in name.lower():
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / (f"media.{ending}" if ending else "series"))
            start = [sys.executable, __file__, "--scale", str(options.scale)]
            subprocess.run([*start, "--make", name, path], check=True)
            found = json.loads(subprocess.run([*start, "--read", name, path], check=True, capture_output=True).stdout)
        ratio = found["peak"] / found["decoded"]
        worst = max(worst, ratio)
        sizes = " | ".join(f"{found[key] / 1e6:,.0f}" for key in ("decoded", "loaded", "peak"))
        print(f"| {name} | {sizes} | {ratio:.2f} |", flush=True)
    print(f"\nhighest: {worst:.2f}, target {TARGET:.0f}")


if __name__ == "__main__":
    main()
