"""DICOM files as pictures: one pass through the grey-scale pipeline, colour as RGB, nothing of the patient."""

import io

import numpy as np
import pytest
from PIL import Image
from test_media import refused
from test_media_volume import lut_sequence

from llavakit.media import Limits, dicom, image_size, load_image, load_video, load_volume

pydicom = pytest.importorskip("pydicom")
from pydicom import examples  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import DigitalXRayImageStorageForPresentation as XRay  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLSLossless  # noqa: E402


def radiograph(pixels, bits=16, *, syntax=ExplicitVRLittleEndian, **fields):
    """The content of a DICOM file with these pixels [rows, columns] or [rows, columns, 3]."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = XRay
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    data.PatientName, data.PatientID = "DOE^JANE", "SECRET-4711"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    data.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = 8 * pixels.dtype.itemsize
    data.BitsStored, data.HighBit = bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    if syntax.is_encapsulated:
        data["PixelData"].VR = "OB"
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def grey(content, **options):
    return np.asarray(load_image(content, **options))[0, :, 0].tolist()


STORED = np.array([[0, 1000, 2047, 3000, 4095]], np.uint16)


@pytest.mark.parametrize(("function", "expected"), [
    (None, [0, 0, 127.44, 246.16, 255]),
    ("LINEAR", [0, 0, 127.44, 246.16, 255]),
    ("LINEAR_EXACT", [0, 0, 127.38, 246.03, 255]),
    ("SIGMOID", [4.59, 29.16, 127.38, 220.63, 250.39]),
])  # fmt: skip
def test_window_functions(function, expected):
    fields = {"WindowCenter": 2048, "WindowWidth": 2048}
    content = radiograph(STORED, 12, **fields | ({"VOILUTFunction": function} if function else {}))
    assert grey(content) == [round(value) for value in expected]
    assert load_image(content).info["voi"] == f"window 2048/2048 {function or 'LINEAR'}"


def test_the_table_wins_over_the_window():
    """With an inverting table beside a window of 4096, stored 0 is white by the table, black by the window."""
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    assert grey(radiograph(STORED, 12, **window))[0] == 0
    content = radiograph(STORED, 12, VOILUTSequence=lut_sequence(4095 - np.arange(4096), 0, 12), **window)
    assert grey(content) == [round((4095 - value) * 255 / 4095) for value in STORED[0].tolist()]
    assert load_image(content).info["voi"] == "VOI LUT"
    narrow = radiograph(STORED, 12, VOILUTSequence=lut_sequence(np.arange(4096) // 16, 0, 8))
    assert grey(narrow) == [0, 62, 127, 187, 255]


def test_the_first_of_several_windows():
    content = radiograph(STORED, 12, WindowCenter=[2048, 40], WindowWidth=[2048, 400])
    assert grey(content) == [0, 0, 127, 246, 255]


def test_the_window_counts_after_rescaling():
    stored = np.array([[0, 974, 1024, 1074, 4095]], np.uint16)
    content = radiograph(stored, 12, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=0.5, WindowWidth=101)
    assert grey(content) == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("voi", [{}, {"WindowCenter": 2048, "WindowWidth": 2048},
                                 {"VOILUTSequence": lut_sequence(np.arange(4096), 0, 12)}])  # fmt: skip
def test_monochrome1_is_inverted_exactly_once(voi):
    plain = grey(radiograph(STORED, 12, **voi))
    inverted = grey(radiograph(STORED, 12, PhotometricInterpretation="MONOCHROME1", **voi))
    assert np.allclose(np.array(plain) + inverted, 255, atol=1)
    assert inverted[0] == 255


@pytest.mark.parametrize(("values", "bits"), [
    (np.arange(256, dtype=np.uint8)[None], 8),
    (np.arange(0, 4096, 13, dtype=np.uint16)[None], 12),
    (np.arange(0, 65536, 257, dtype=np.uint16)[None], 16),
    (np.arange(-1000, 1000, 7, dtype=np.int16)[None], 16),
])  # fmt: skip
def test_a_png_of_the_same_pixels_gives_the_same_picture(tmp_path, values, bits):
    content = radiograph(values, bits)
    if values.dtype.kind == "i":
        Image.fromarray(values.astype(np.int32)).save(tmp_path / "a.tif")
        other = load_image(tmp_path / "a.tif")
    else:
        Image.fromarray(values).save(tmp_path / "a.png")
        other = load_image(tmp_path / "a.png")
    assert np.array_equal(load_image(content), other)
    assert load_image(content).info["voi"] == "none"
    assert image_size(content) == (1, 1, values.shape[1])


def test_few_bits_fill_the_scale():
    assert grey(radiograph(np.array([[0, 1, 15]], np.uint8), 4)) == [0, 17, 255]


def test_padding_is_black_and_decides_no_scale():
    stored = np.array([[0, 100, 200, 60000]], np.uint16)

    def padded(**fields):
        content = pydicom.dcmread(io.BytesIO(radiograph(stored, 16, **fields)))
        content.add_new("PixelPaddingValue", "US", 60000)
        stream = io.BytesIO()
        content.save_as(stream)
        return stream.getvalue()

    assert grey(padded()) == [0, 100, 200, 0]
    assert grey(padded(PhotometricInterpretation="MONOCHROME1")) == [255, 155, 55, 0]


def test_wide_integers_and_bands():
    values = np.random.default_rng(0).integers(0, 4096, (1100, 1000)).astype(np.uint32)
    wide = load_image(radiograph(values, 32, WindowCenter=2048, WindowWidth=4096))
    narrow = load_image(radiograph(values.astype(np.uint16), 16, WindowCenter=2048, WindowWidth=4096))
    assert np.array_equal(wide, narrow)


# Colour


def test_colour_becomes_rgb_exactly_once():
    """pydicom converts YBR while it decodes, and leaves YBR in the header; converted again, the mean is (1, 134, 1)."""
    ybr = np.asarray(load_image(examples.get_path("ybr_color"), frame=0))
    assert np.allclose(ybr.reshape(-1, 3).mean(axis=0), (9.21, 9.53, 9.67), atol=0.01)
    rgb = np.asarray(load_image(examples.get_path("rgb_color")))
    assert np.array_equal(rgb, pydicom.dcmread(examples.get_path("rgb_color")).pixel_array)
    colours = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(load_image(radiograph(colours, 8))), colours)
    deep = colours.astype(np.uint16) * 257
    assert np.array_equal(np.asarray(load_image(radiograph(deep, 16))), colours)


def test_palettes_go_through_their_table():
    data = pydicom.dcmread(examples.get_path("palette_color"))
    expected = pydicom.pixels.apply_color_lut(data.pixel_array, data)
    assert np.array_equal(np.asarray(load_image(examples.get_path("palette_color"))), (expected >> 8).astype(np.uint8))


# Frames, compression, what is no picture


def test_several_frames():
    path = examples.get_path("ybr_color")
    refused(lambda: load_image(path), "holds 30 frames; name one, from 0 to 29", "reading.image.frame")
    refused(lambda: load_image(path, frame=30), "no frame 30", "holds 30")
    frames = [np.asarray(load_image(path, frame=number)) for number in (0, 29)]
    assert not np.array_equal(*frames)
    assert image_size(path, frame=3) == (1, frames[0].shape[0], frames[0].shape[1])


def jpeg(size):
    stream = io.BytesIO()
    Image.new("L", size, 77).save(stream, "JPEG")
    return stream.getvalue()


def compressed(content, syntax, shape=(16, 16)):
    return radiograph(np.zeros(shape, np.uint8), 8, syntax=syntax, PixelData=encapsulate([content]))


def test_compressed_pixels():
    assert grey(compressed(jpeg((16, 16)), JPEGBaseline8Bit))[:2] == [77, 77]
    refused(lambda: load_image(compressed(jpeg((160, 90)), JPEGBaseline8Bit)), "pixels are 160 x 90", "16 x 16")
    refused(lambda: load_image(compressed(b"\0" * 64, JPEGBaseline8Bit)), "its pixels cannot be decoded")
    assert image_size(compressed(b"\0" * 64, JPEGBaseline8Bit)) == (1, 16, 16)


def test_missing_decoders_are_named_with_their_package():
    if pydicom.pixels.get_decoder(JPEGLSLossless).is_available:
        pytest.skip("a decoder of JPEG-LS is installed")
    refused(lambda: load_image(compressed(b"x" * 64, JPEGLSLossless)), "JPEG-LS Lossless", "install", "pyjpegls")
    private = pydicom.uid.UID("1.2.826.0.1.3680043.8.498.1")
    content = radiograph(np.zeros((4, 4), np.uint8), 8)
    data = pydicom.dcmread(io.BytesIO(content))
    data.file_meta.TransferSyntaxUID = private
    private.set_private_encoding(False, True)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    refused(lambda: load_image(stream.getvalue()), "transfer syntax that pydicom does not know", str(private))


def test_what_is_no_picture(tmp_path):
    data = pydicom.dcmread(io.BytesIO(radiograph(STORED, 12)))
    cases = [
        (lambda d: d.__delattr__("PixelData"), ["holds no pixels", "another kind"]),
        (lambda d: d.__delattr__("Rows"), ["has no Rows"]),
        (lambda d: setattr(d, "PhotometricInterpretation", "HSV"), ["PhotometricInterpretation", "MONOCHROME1"]),
        (lambda d: setattr(d, "WindowWidth", 0), ["WindowWidth is 0"]),
        (lambda d: setattr(d, "VOILUTFunction", "CUBIC"), ["VOILUTFunction", "SIGMOID"]),
        (lambda d: setattr(d, "PixelData", d.PixelData[:4]), ["its pixels cannot be decoded"]),
        (lambda d: setattr(d, "SamplesPerPixel", 2), ["its pixels cannot be decoded"]),
        (lambda d: d.file_meta.__delattr__("TransferSyntaxUID"), ["pixels"]),
    ]
    for number, (spoil, words) in enumerate(cases):
        spoilt = pydicom.dcmread(io.BytesIO(radiograph(STORED, 12)))
        spoilt.WindowCenter, spoilt.WindowWidth = 2048, 2048
        spoil(spoilt)
        path = tmp_path / f"{number}.dcm"
        spoilt.save_as(path, implicit_vr=False, little_endian=True)
        refused(lambda path=path: load_image(path), f"{number}.dcm", *words)
    assert data.Rows == 1
    path = tmp_path / "cut.dcm"
    path.write_bytes(radiograph(STORED, 12)[:300])
    refused(lambda: load_image(path), "cut.dcm")
    refused(lambda: load_image(radiograph(STORED, 12), limits=Limits(pixels=3)), "5 x 1 = 5 pixels")
    refused(lambda: load_volume(radiograph(STORED, 12)), "bytes>: ")
    refused(lambda: load_video(radiograph(STORED, 12)), "begins like a DICOM file")


def test_deflated_files_are_bounded(monkeypatch):
    content = io.BytesIO()
    data = pydicom.dcmread(io.BytesIO(radiograph(np.zeros((200, 200), np.uint16), 12)))
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(content, enforce_file_format=True)
    assert len(content.getvalue()) < 3000
    assert load_image(content.getvalue()).size == (200, 200)
    monkeypatch.setattr(dicom, "_MOST_INFLATED", 50_000)
    refused(lambda: load_image(content.getvalue()), "deflated", "more than 50,000 bytes")


def test_nothing_of_the_patient_is_kept():
    image = load_image(radiograph(STORED, 12, WindowCenter=2048, WindowWidth=2048))
    assert list(image.info) == ["voi", "one_channel"]
    assert "DOE" not in str(image.info)


def test_pictures_without_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pydicom", None)
    refused(lambda: load_image(radiograph(STORED, 12)), "pydicom", "pip install 'llavakit[medical]'")
