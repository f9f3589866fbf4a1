"""Reading of media: what is accepted, and the one line that refused files get."""

import gzip
import os
import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from llavakit.errors import MediaError, UserError
from llavakit.media import Limits, image_size, load_image, load_video, load_volume

RED = (200, 30, 60)


def refused(call, *words):
    """The message of the refusal: one line that contains all words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# Images


@pytest.fixture
def picture():
    return Image.new("RGB", (64, 48), RED)


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif"])
def test_image_formats(tmp_path, picture, suffix):
    path = tmp_path / f"a.{suffix}"
    picture.save(path, **({"lossless": True} if suffix == "webp" else {}))
    for source in (path, str(path), path.read_bytes()):
        image = load_image(source)
        assert (image.mode, image.size, image.getpixel((5, 5))) == ("RGB", (64, 48), RED)
    assert image_size(path) == (1, 48, 64)


def test_refused_images(tmp_path, picture):
    def file(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    picture.save(tmp_path / "whole.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    jpeg, png = (tmp_path / "whole.jpg").read_bytes(), (tmp_path / "noise.png").read_bytes()
    damaged = bytearray(png)
    damaged[2000:2040] = bytes(40)
    cases = [
        (file("text.jpg", b"hello there"), ["text.jpg", "is not an image", "'hello there'", "JPEG"]),
        (file("page.png", b"<!DOCTYPE html><html>"), ["page.png", "HTML"]),
        (file("lfs.png", b"version https://git-lfs.github.com/spec/v1\n"), ["Git LFS pointer"]),
        (file("empty.jpg", b""), ["empty.jpg", "empty (0 bytes)"]),
        (file("cut.jpg", jpeg[: len(jpeg) // 2]), ["cut.jpg", "cut off"]),
        (file("cut.png", png[: len(png) // 2]), ["cut.png", "cut off"]),
        (file("damaged.png", bytes(damaged)), ["damaged.png", "damaged"]),
        (file("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ["a.eps", "PostScript"]),
        (tmp_path / "missing.jpg", ["missing.jpg", "no such file"]),
        (tmp_path, ["is a folder"]),
        ("https://127.0.0.1/a.jpg", ["https://127.0.0.1/a.jpg", "is not a public address"]),
        ("ftp://example.org/a.jpg", ["addresses of this kind are not read"]),
        ("https://[a.jpg", ["URL is malformed"]),
        ("data:image/png;base64," + 9000 * "A", ["data:image/png", "is not an image", "bytes 00"]),
        ("data:image/png;base64,A", ["does not hold valid base64"]),
        (9000 * "a", ["file name too long"]),
        ("a\0b", ["cannot be read"]),
        (None, ["is no file"]),
        (b"", ["empty"]),
    ]
    for source, words in cases:
        refused(lambda source=source: load_image(source), *words)


def test_size_is_checked_before_decoding():
    refused(lambda: load_image(png_header(60_000, 60_000)), "pixels")
    refused(lambda: load_image(png_header(3000, 3000), limits=Limits(pixels=10**6)), "9,000,000 pixels", "1,000,000")
    refused(lambda: load_image(png_header(100_000, 2)), "no side may exceed")
    refused(lambda: load_image(png_header(10, 10), limits=Limits(file_bytes=10)), "the limit is 10")
    refused(lambda: load_image(Image.new("RGB", (50, 50)), limits=Limits(pixels=100)), "2,500 pixels")


def test_cmyk_keeps_its_colours(tmp_path, picture):
    for name in ("a.jpg", "a.tif"):
        picture.convert("CMYK").save(tmp_path / name)
        found = load_image(tmp_path / name).getpixel((5, 5))
        assert max(abs(a - b) for a, b in zip(found, RED, strict=True)) <= 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 40000, 65535]], np.uint16), [0, 156, 255]),
        (np.array([[0, 2048, 4095]], np.uint16), [0, 128, 255]),  # 12 bits in a 16-bit file
        (np.array([[0, 7, 255]], np.uint16), [0, 7, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 99.0, np.nan]], np.float32), [0, 99, 0]),
    ],
)
def test_deep_grey_becomes_8_bit(tmp_path, values, expected):
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    image = load_image(path)
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == expected


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(tmp_path / "a.png", background=None).getpixel((0, 0)) == (0, 0, 0)
    assert load_image(tmp_path / "a.png", background=[1, 2, 3]).getpixel((0, 0)) == (1, 2, 3)
    palette = Image.new("P", (4, 4))
    palette.putpalette([*RED, *[0] * 765])
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "t.png", transparency=0)
    assert load_image(tmp_path / "p.png").getpixel((0, 0)) == RED
    assert load_image(tmp_path / "t.png").getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame(tmp_path, picture):
    picture.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (64, 48), (0, 0, 255))])
    assert load_image(tmp_path / "a.gif").getpixel((9, 9)) == RED


def test_rotation_by_exif(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (48, 64)
    assert load_image(tmp_path / "a.jpg", exif_transpose=False).size == (64, 48)
    assert image_size(tmp_path / "a.jpg") == (1, 64, 48)
    assert image_size(tmp_path / "a.jpg", exif_transpose=False) == (1, 48, 64)


# Videos


def write_video(path, count=30, rate=10, codec="mpeg4", times=None, picture=None, gop=12, **options):
    """A video whose frame i has grey value 8 i."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", gop
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(count):
            pixels = np.full((48, 64, 3), index * 8 % 256, np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(video):
    return [round(float(np.asarray(frame).mean()) / 8) for frame in video.frames]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov"])
def test_frames_are_the_ones_asked_for(tmp_path, name):
    path = write_video(tmp_path / name)
    video = load_video(path)
    assert video.size == (8, 48, 64)
    assert video.indices == [0, 4, 8, 12, 16, 20, 24, 29]
    assert greys(video) == video.indices
    assert np.allclose(video.timestamps, [index / 10 for index in video.indices])
    assert video.duration == pytest.approx(3.0, abs=0.05)
    assert video.average_rate == pytest.approx(10)
    late = load_video(path.read_bytes(), {"type": "step", "fps": 0.5})
    assert greys(late) == late.indices == [0, 20]


def test_short_video_repeats_frames(tmp_path):
    video = load_video(write_video(tmp_path / "a.mp4", count=3), {"type": "uniform", "frames": 6})
    assert video.indices == [0, 0, 0, 1, 1, 2]
    assert len(video.frames) == 6


def test_variable_rate_goes_by_time_stamps(tmp_path):
    times = [i * 100 for i in range(10)] + [1000 + i * 1000 for i in range(10)]
    path = write_video(tmp_path / "a.mkv", count=20, times=times)
    video = load_video(path, {"type": "rate", "fps": 1.0})
    assert video.indices == [0, *range(10, 20)]
    assert np.allclose(video.timestamps, range(11))
    every = load_video(path, {"type": "all"})
    assert all(frame == every.frames[index] for frame, index in zip(video.frames, video.indices, strict=True))


def test_turned_video_is_shown_upright(tmp_path):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32] = 255  # white on the left
    path = write_video(tmp_path / "a.mp4", count=2, picture=picture)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # version 0: 40 bytes up to the matrix
    unit = 1 << 16
    content[matrix : matrix + 36] = struct.pack(">9i", 0, unit, 0, -unit, 0, 0, 48 * unit, 0, 1 << 30)
    path.write_bytes(content)
    frame = np.asarray(load_video(path).frames[0])
    assert frame.shape == (64, 48, 3)
    assert frame[:28].mean() > 240  # a quarter turn clockwise brings the left to the top
    assert frame[36:].mean() < 15
    assert load_video(path, rotate=False).size == (8, 48, 64)


def test_refused_videos(tmp_path):
    def file(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    whole = write_video(tmp_path / "a.mp4").read_bytes()
    streamed = write_video(tmp_path / "b.mp4", options={"movflags": "faststart"}).read_bytes()
    matroska = write_video(tmp_path / "a.mkv").read_bytes()
    damaged = bytearray(whole)
    for at in range(200, len(damaged) // 2):
        damaged[at] = (damaged[at] * 7 + 13) % 256
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path / 'a.mp4'}\n#EXT-X-ENDLIST\n"
    (tmp_path / "nothing").mkdir()
    cases = [
        (file("text.mp4", b"no video here"), ["text.mp4", "not a readable video", "'no video here'"]),
        (file("empty.mp4", b""), ["empty (0 bytes)"]),
        (file("no_index.mp4", whole[: len(whole) // 2]), ["no_index.mp4", "cut off or damaged"]),
        (file("cut.mp4", streamed[: len(streamed) * 7 // 10]), ["cut.mp4", "is cut off", "of 30 frames"]),
        (file("cut.mkv", matroska[: len(matroska) // 2]), ["cut.mkv", "is cut off", "of 3.0 s"]),
        (file("damaged.mp4", bytes(damaged)), ["damaged.mp4", "cannot be decoded"]),
        (tmp_path / "sound.mp4", ["sound.mp4", "no video stream"]),
        (file("list.m3u8", playlist.encode()), ["not a readable video"]),
        (file("list.mp4", f"ffconcat version 1.0\nfile {tmp_path / 'a.mp4'}\n".encode()), ["not a readable video"]),
        (tmp_path / "missing.mp4", ["no such file"]),
        (tmp_path / "nothing", ["holds no frames"]),
    ]
    for source, words in cases:
        refused(lambda source=source: load_video(source), *words)
    for missing in range(150, 1000, 50):  # the index at the end is there in part
        refused(lambda missing=missing: load_video(whole[:-missing]), "bytes>: ")
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    refused(lambda: load_video(tmp_path / "none.avi"), "none.avi", "has no frames")
    refused(lambda: load_video(tmp_path / "a.mp4", {"type": "all"}, limits=Limits(frames=5)), "30 of 30", "limit is 5")
    refused(lambda: load_video(tmp_path / "a.mp4", limits=Limits(video_pixels=9000)), "8 frames of 3,072 pixels")
    refused(lambda: load_video(tmp_path / "a.mp4", limits=Limits(pixels=100)), "64 x 48")
    assert load_video(tmp_path / "cut.mp4", {"type": "all"}, partial=True).size.depth < 30


def test_folder_and_list_of_frames(tmp_path, picture):
    for index in range(5):
        Image.new("RGB", (10, 8), (index * 9,) * 3).save(tmp_path / f"{index:03}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = load_video(tmp_path, rate=2.0)
    assert video.size == (5, 8, 10)
    assert video.timestamps == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert load_video(tmp_path, {"type": "uniform", "frames": 3}).indices == [0, 2, 4]
    arrays = [np.asarray(frame) for frame in video.frames]
    assert np.array_equal(np.asarray(load_video(arrays).frames[3]), arrays[3])
    refused(lambda: load_video([picture, Image.new("RGB", (9, 9))]), "frame 1", "one size")


# Volumes


def grid(depth=4, rows=5, columns=6):
    """Hounsfield-like values that tell every voxel apart, standing [slices, rows, columns]."""
    return np.arange(depth * rows * columns, dtype=np.float32).reshape(depth, rows, columns) - 50


def test_npy_volumes(tmp_path):
    values = grid()
    np.save(tmp_path / "a.npy", values.astype(np.int16))
    volume = load_volume(tmp_path / "a.npy")
    assert volume.values.dtype == np.float32
    assert np.array_equal(volume.values, values)
    assert volume.spacing is None
    np.save(tmp_path / "b.npy", values[None])
    assert load_volume((tmp_path / "b.npy").read_bytes()).values.shape == values.shape
    windowed = load_volume(values, window=[-10, 10]).values
    assert (windowed.min(), windowed.max()) == (-10, 10)


def test_refused_arrays(tmp_path):
    values = grid()
    values[0, 0, :2] = np.nan
    refused(lambda: load_volume(values), "2 of 120 voxels are NaN")
    assert load_volume(values, fill=-1000.0).values[0, 0, 0] == -1000
    refused(lambda: load_volume(np.zeros((2, 3, 4, 5))), "(2, 3, 4, 5)", "three axes")
    refused(lambda: load_volume(np.zeros((4, 5))), "three axes")
    refused(lambda: load_volume(np.zeros((2, 2, 2), complex)), "real numbers")
    refused(lambda: load_volume(grid(), limits=Limits(voxels=100)), "120 voxels", "100")
    np.save(tmp_path / "whole.npy", grid())
    content = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-100])
    refused(lambda: load_volume(tmp_path / "cut.npy"), "cut.npy", "cut off")
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    refused(lambda: load_volume(tmp_path / "objects.npy"), "objects.npy", "not a readable .npy")
    (tmp_path / "text.npy").write_text("hello")
    refused(lambda: load_volume(tmp_path / "text.npy"), "'hello'")
    (tmp_path / "a.txt").write_text("hello")
    refused(lambda: load_volume(tmp_path / "a.txt"), "no volume by its name", "DICOM series")


def save_nifti(path, values, codes="RAS", spacing=(3.0, 2.0, 1.0), stated=True):
    """A NIfTI file of a standing volume, stored along other axes."""
    nibabel = pytest.importorskip("nibabel")
    from nibabel import orientations

    standing = values.transpose(2, 1, 0)  # left, posterior, superior
    transform = orientations.ornt_transform(
        orientations.axcodes2ornt(("L", "P", "S")), orientations.axcodes2ornt(tuple(codes))
    )
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    stored = orientations.apply_orientation(standing, transform)
    affine = affine @ orientations.inv_ornt_aff(transform, standing.shape)
    image = nibabel.Nifti1Image(np.ascontiguousarray(stored), affine)
    if not stated:
        image.set_sform(affine, code=0)
        image.set_qform(affine, code=0)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LPI", "ASL", "SRP"])
def test_nifti_stands_upright_whatever_its_axes(tmp_path, codes):
    for name in ("a.nii", "a.nii.gz"):
        path = save_nifti(tmp_path / name, grid(), codes)
        for source in (path, path.read_bytes()):
            volume = load_volume(source)
            assert np.array_equal(volume.values, grid())
            assert np.allclose(volume.spacing, (3.0, 2.0, 1.0))


def test_refused_nifti(tmp_path):
    refused(
        lambda: load_volume(save_nifti(tmp_path / "a.nii", grid(), stated=False)),
        "codes are 0",
        "RAS (reading.volume.orientation)",
    )
    assert np.array_equal(load_volume(tmp_path / "a.nii", orientation="RAS").values, grid())
    refused(lambda: load_volume(tmp_path / "a.nii", orientation="RRS"), "'RRS'")
    refused(lambda: load_volume(tmp_path / "a.nii", orientation="front"), "'front'")
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5, 2), np.float32), np.eye(4)), tmp_path / "four.nii")
    refused(lambda: load_volume(tmp_path / "four.nii"), "four.nii", "2 volumes")
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5, 1), np.float32), np.eye(4)), tmp_path / "one.nii")
    assert load_volume(tmp_path / "one.nii").values.shape == (5, 4, 3)
    (tmp_path / "text.nii").write_text("hello")
    refused(lambda: load_volume(tmp_path / "text.nii"), "text.nii", "'hello'")
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9), np.float32), np.eye(4)), tmp_path / "cut.nii")
    (tmp_path / "cut.nii").write_bytes((tmp_path / "cut.nii").read_bytes()[:-500])
    refused(lambda: load_volume(tmp_path / "cut.nii"), "cut.nii", "cut off")
    refused(lambda: load_volume(tmp_path / "one.nii", limits=Limits(voxels=50)), "60 voxels")
    bomb = bytearray((tmp_path / "one.nii").read_bytes())
    struct.pack_into("<f", bomb, 108, 1e9)  # a gigabyte of comments in front of the voxels
    refused(lambda: load_volume(gzip.compress(bytes(bomb))), "voxels begin at byte 1,000,000,000")


def save_dicom(folder, values, *, series="1.2.3", order=None, spacing=(3.0, 2.0, 1.0), positions=True, start=0):
    """A series of a standing volume, slice files in the given order of names."""
    pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(exist_ok=True)
    for number, index in enumerate(order or range(len(values)), start=start):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.SeriesInstanceUID = series
        data.Rows, data.Columns = values[index].shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = 0.5, -1024
        data.PixelSpacing = [spacing[1], spacing[2]]
        data.InstanceNumber = 100 - index
        if positions:
            data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            data.ImagePositionPatient = [-10.0, -20.0, 5.0 + spacing[0] * index]
        data.PixelData = ((values[index] + 1024) * 2).astype("<u2").tobytes()
        data.save_as(folder / f"{number:03}.dcm", enforce_file_format=True)
    return folder


def test_dicom_slices_are_sorted_by_place(tmp_path):
    folder = save_dicom(tmp_path / "ct", grid(), order=[2, 0, 3, 1])
    (folder / "README.txt").write_text("not an image")
    volume = load_volume(folder)
    assert np.array_equal(volume.values, grid())
    assert np.allclose(volume.spacing, (3.0, 2.0, 1.0))
    nifti = load_volume(save_nifti(tmp_path / "a.nii.gz", grid()))
    assert np.array_equal(nifti.values, volume.values)  # one volume, two formats
    numbered = load_volume(save_dicom(tmp_path / "numbers", grid(), positions=False))
    assert np.array_equal(numbered.values, grid()[::-1])  # only InstanceNumber is left
    assert numbered.spacing is None


def test_refused_dicom(tmp_path):
    folder = save_dicom(tmp_path / "two", grid())
    save_dicom(folder, grid(), series="4.5.6", start=10)
    refused(lambda: load_volume(folder), "holds 2 series", "1.2.3: 4 slices", "4.5.6")
    assert np.array_equal(load_volume(folder, series="4.5.6").values, grid())
    refused(lambda: load_volume(folder, series="7"), "no series '7'")
    twice = save_dicom(tmp_path / "twice", grid())
    save_dicom(twice, grid(), order=[1], start=20)
    refused(lambda: load_volume(twice), "two slices lie in one place")
    gap = save_dicom(tmp_path / "gap", grid(6), order=[0, 1, 2, 4, 5])
    refused(lambda: load_volume(gap), "slices are missing between 002.dcm and 003.dcm", "6.00 mm")
    assert load_volume(gap, gaps=True).values.shape == (5, 5, 6)
    mixed = save_dicom(tmp_path / "mixed", grid())
    save_dicom(mixed, grid(5, 7, 7), order=[4], start=30)
    refused(lambda: load_volume(mixed), "030.dcm", "Rows is 7")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.dcm").write_text("hello")
    refused(lambda: load_volume(tmp_path / "text"), "a.dcm", "'hello'")
    (tmp_path / "none").mkdir()
    refused(lambda: load_volume(tmp_path / "none"), "holds no DICOM images")
    cut = save_dicom(tmp_path / "cut", grid())
    whole = (cut / "001.dcm").read_bytes()
    (cut / "001.dcm").write_bytes(whole[:-20])
    refused(lambda: load_volume(cut), "001.dcm", "cannot be decoded")


def test_missing_extra_is_named(tmp_path, monkeypatch):
    path = save_nifti(tmp_path / "a.nii", grid())
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(UserError, match=r"pip install 'llavakit\[medical\]'"):
        load_volume(path)


def test_the_size_of_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "own.png"
    for size in ((4, 6), (8, 2), (3, 3)):
        Image.new("RGB", size).save(path)
        os.utime(path, ns=(0, size[0]))
        assert [image_size(path)[1:] for _ in range(2)] == [size[::-1]] * 2
    with pytest.raises(MediaError, match="limit is 8"):
        image_size(path, limits=Limits(pixels=8))
