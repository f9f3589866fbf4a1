"""Volumes whose headers disagree, lie or name other units; DICOM series as scanners and exports really are."""

import gzip
import io
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
from test_media import grid, refused, save_dicom, save_nifti

from llavakit.media import Limits, load_volume

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")


def nifti(values, affine=None, **changes):
    """The content of a NIfTI file [x, y, z]; `changes` of header fields."""
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    for field, value in changes.items():
        image.header[field] = value
    return image.to_bytes()


# NIfTI


@pytest.mark.parametrize(("code", "size"), [(1, 0.0005), (2, 0.5), (3, 500.0), (0, 0.5), (2 + 8, 0.5), (3 + 16, 500.0)])
def test_units_decide_the_spacing(code, size):
    """0.0005 m, 0.5 mm and 500 micrometres are one; the unit of time in the same field changes nothing."""
    volume = load_volume(nifti(np.zeros((3, 4, 5), np.int16), np.diag([size, size, 2 * size, 1]), xyzt_units=code))
    assert np.allclose(volume.spacing, (1.0, 0.5, 0.5))
    plain = nifti(np.zeros((3, 4, 5), np.int16), np.diag([size, size, 2 * size, 1]), xyzt_units=code)
    image = nibabel.Nifti1Image.from_bytes(plain)
    image.set_sform(image.affine, 0)
    image.set_qform(image.affine, 0)
    image.header["xyzt_units"] = code
    assert np.allclose(load_volume(image.to_bytes(), orientation="RAS").spacing, (1.0, 0.5, 0.5))


def test_unknown_units_are_refused():
    refused(lambda: load_volume(nifti(np.zeros((3, 4, 5), np.int16), xyzt_units=5)), "code 5", "xyzt_units")


def test_sform_and_qform_that_disagree():
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.set_sform(np.diag([-2.0, 1, 1, 1]), 1)  # left and right the other way round
    image.set_qform(np.diag([1.0, 1, 1, 1]), 1)
    content = image.to_bytes()
    refused(
        lambda: load_volume(content),
        "sform and qform disagree (LAS with 2 x 1 x 1 mm and RAS with 1 x 1 x 1 mm)",
        "reading.volume.affine",
    )
    by_sform, by_qform = (load_volume(content, affine=which) for which in ("sform", "qform"))
    assert np.array_equal(by_sform.values, by_qform.values[..., ::-1])
    assert (by_sform.spacing, by_qform.spacing) == ((1.0, 1.0, 2.0), (1.0, 1.0, 1.0))
    refused(lambda: load_volume(content, affine="best"), "affine: must be sform or qform", "'best'")
    image.set_sform(np.diag([2.0, 1, 1, 1]), 1)
    refused(lambda: load_volume(image.to_bytes()), "disagree", "2 x 1 x 1")
    image.set_sform(np.diag([1.0, 1, 1, 1]) + 1e-5, 4)  # a registration that changes next to nothing
    assert load_volume(image.to_bytes()).values.shape == (5, 4, 3)
    image.set_qform(None, 0)
    refused(lambda: load_volume(image.to_bytes(), affine="qform"), "states no qform")


def test_axes_of_space_may_be_of_length_1():
    """One sagittal slice with an axis of time of length 1: the first axis stays."""
    values = np.arange(20, dtype=np.int16).reshape(1, 4, 5, 1)
    volume = load_volume(nifti(values, np.diag([-1, -1, 1, 1])))
    assert np.array_equal(volume.values, values[..., 0].transpose(2, 1, 0))
    refused(lambda: load_volume(nifti(np.zeros((1, 4, 5, 6), np.int16))), "6 volumes")


def test_values_that_are_no_grey_values():
    rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(lambda: load_volume(nifti(rgb)), "holds colours (RGB)", "one real number per voxel")
    refused(lambda: load_volume(nifti(np.zeros((3, 4, 5), np.complex64))), "holds complex values")
    refused(lambda: load_volume(np.zeros((3, 4, 5), np.complex64)), "complex64", "real numbers")


def test_analyze_files_state_no_directions(tmp_path):
    nibabel.save(nibabel.AnalyzeImage(np.zeros((3, 4, 5), np.int16), np.eye(4)), tmp_path / "a.img")
    refused(lambda: load_volume(tmp_path / "a.img"), "does not say how its axes lie", "reading.volume.orientation")
    assert load_volume(tmp_path / "a.img", orientation="LAS").values.shape == (5, 4, 3)


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("scaling", [None, (0.5, -3.25), (1.0, -1024.0)])
def test_values_are_nibabels_own(dtype, scaling):
    """Converted in pieces as they are read, plain or packed, and equal to what nibabel gives."""
    values = np.random.default_rng(0).integers(0, 100, (7, 6, 5)).astype(dtype)
    image = nibabel.Nifti1Image(values, np.diag([-1, -1, 1, 1]))
    if scaling:
        image.header.set_slope_inter(*scaling)
    stored = nibabel.Nifti1Image.from_bytes(image.to_bytes())
    expected = np.asarray(stored.dataobj, dtype=np.float32).transpose(2, 1, 0)
    for content in (image.to_bytes(), gzip.compress(image.to_bytes())):
        volume = load_volume(content)
        assert volume.values.dtype == np.float32
        assert np.array_equal(volume.values, expected)
        kept = load_volume(content, keep_integers=True).values
        assert np.array_equal(kept, expected)
        integers = scaling is None and np.dtype(dtype).kind in "iu" and np.dtype(dtype).itemsize <= 2
        assert kept.dtype == (np.dtype(dtype).newbyteorder("=") if integers else np.float32)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LPI", "ASL", "SRP", "PIR", "IAL"])
def test_integers_stand_upright_too(tmp_path, codes):
    path = save_nifti(tmp_path / "a.nii.gz", grid().astype(np.int16), codes)
    volume = load_volume(path, keep_integers=True)
    assert volume.values.dtype == np.int16
    assert volume.values.flags.c_contiguous
    assert np.array_equal(volume.values, grid())


def peak_of(call):
    """Highest memory in bytes that Python and NumPy allocate during a refusal."""
    tracemalloc.start()
    try:
        refused(call, ": ")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_announced_sizes_allocate_nothing(tmp_path):
    """A header of a few hundred bytes may announce gigabytes."""
    small = nifti(np.zeros((3, 4, 5), np.int16))
    huge = bytearray(small)
    struct.pack_into("<4h", huge, 40, 3, 1000, 1000, 900)
    (tmp_path / "a.nii").write_bytes(huge)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(huge)))
    for source in (bytes(huge), gzip.compress(bytes(huge)), tmp_path / "a.nii", tmp_path / "a.nii.gz"):
        assert peak_of(lambda source=source: load_volume(source)) < 20e6
    for shape in ("(1000, 1000, 900)", "(30000000000, 1, 1)", "(-3, 4, 5)"):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(240)
        (tmp_path / "a.npy").write_bytes(content)
        for source in (content, tmp_path / "a.npy"):
            assert peak_of(lambda source=source: load_volume(source)) < 20e6
    offset = bytearray(small)
    struct.pack_into("<f", offset, 108, float("nan"))
    assert peak_of(lambda: load_volume(bytes(offset))) < 20e6


def test_npy_headers(tmp_path):
    values = np.arange(60, dtype=">i2").reshape(3, 4, 5)
    for array in (values, np.asfortranarray(values), values.astype(np.float64), values.astype(np.uint8)):
        stream = io.BytesIO()
        np.save(stream, array)
        assert np.array_equal(load_volume(stream.getvalue()).values, values)
    large = io.BytesIO()
    np.save(large, np.full((2, 3, 4), 1e300))
    refused(lambda: load_volume(large.getvalue()), "24 of 24 voxels are NaN or infinite")
    structured = io.BytesIO()
    np.save(structured, np.zeros((2, 2, 2), [("\N{GREEK SMALL LETTER ALPHA}", "f4")]))
    refused(lambda: load_volume(structured.getvalue()), "not a readable .npy", "plain numbers")


def test_windows_are_checked():
    for window in ([1000, -1000], [1], "ab", [0, float("nan")], 5, [None, 1]):
        refused(lambda window=window: load_volume(grid(), window=window), "window: must be two numbers")
    integers = load_volume(grid().astype(np.int16), window=[-10.5, 10], keep_integers=True).values
    assert (integers.min(), integers.max()) == (-10.5, 10)


def test_arrays_of_the_caller_stay_as_they_are():
    values = grid()
    values[0, 0, 0] = np.nan
    before = values.copy()
    load_volume(values, fill=0.0, window=[-1, 1])
    assert np.array_equal(values, before, equal_nan=True)


# DICOM series


def edit(folder, change, names=None):
    """Change the data sets of a series in place."""
    for number, path in enumerate(sorted(folder.iterdir())):
        if names is None or path.name in names:
            data = pydicom.dcmread(path)
            change(data, number)
            data.save_as(path)
    return folder


def test_geometry_within_rounding_is_one_geometry(tmp_path):
    folder = save_dicom(tmp_path / "ct", grid())

    def round_off(data, number):
        data.ImageOrientationPatient = [1, 5e-5 * number / 3, 0, 0, 1, -5e-5 * number / 3]
        data.PixelSpacing = [2.0 + 4e-5 * number / 3, 1.0]

    assert np.array_equal(load_volume(edit(folder, round_off)).values, grid())

    def differ(data, number):
        data.PixelSpacing = [2.001, 1.0]

    refused(lambda: load_volume(edit(folder, differ, ["002.dcm"])), "002.dcm: PixelSpacing is [2.001, 1.0]")

    def tilt(data, number):
        data.ImageOrientationPatient = [1, 0, 0, 0, 0.9998, 0.02]

    other = save_dicom(tmp_path / "other", grid())
    refused(lambda: load_volume(edit(other, tilt, ["001.dcm"])), "001.dcm: ImageOrientationPatient is")

    def forget(data, number):
        del data.PixelSpacing

    third = save_dicom(tmp_path / "third", grid())
    refused(lambda: load_volume(edit(third, forget, ["003.dcm"])), "003.dcm: PixelSpacing is missing")


def test_a_slice_without_position_is_named(tmp_path):
    folder = save_dicom(tmp_path / "ct", grid())

    def forget(data, number):
        del data.ImagePositionPatient

    edit(folder, forget, ["002.dcm"])
    refused(lambda: load_volume(folder), "002.dcm: has no position", "3 other slices")
    (folder / "002.dcm").unlink()
    refused(lambda: load_volume(folder), "slices are missing")


@pytest.mark.parametrize("angle", [-20.0, 12.0])
def test_gantry_tilt_is_corrected(tmp_path, angle):
    """A straight column, scanned with a tilted gantry, comes out straight; slices are a cosine apart."""
    rows, columns, depth, step, pixel = 40, 8, 9, 5.0, 1.0
    tilt = np.radians(angle)
    down, up = np.array([0.0, np.cos(tilt), np.sin(tilt)]), np.array([0.0, -np.sin(tilt), np.cos(tilt)])
    positions = [np.array([0.0, 0.0, step * index]) for index in range(depth)]
    stack = np.zeros((depth, rows, columns), np.float32)
    for index, position in enumerate(positions):
        # The column runs along the normal of the slices; `row` is where it crosses this slice.
        row = (np.array([0.0, 20.0, 0.0]) - position) @ down / pixel
        centres = np.arange(rows)
        stack[index] = 800 * np.clip(1 - np.abs(centres - row) / 3, 0, 1)[:, None]
    folder = save_dicom(tmp_path / "ct", np.rint(stack))

    def place(data, number):
        data.ImageOrientationPatient = [1, 0, 0, *down]
        data.PixelSpacing = [pixel, pixel]
        data.ImagePositionPatient = [float(value) for value in positions[number]]

    volume = load_volume(edit(folder, place))
    weights = volume.values - volume.values.min()
    centres = (weights.sum(axis=2) * np.arange(weights.shape[1])).sum(axis=1) / weights.sum(axis=(1, 2))
    assert np.ptp(centres) < 0.1
    assert np.ptp((stack.sum(axis=2) * np.arange(rows)).sum(axis=1) / stack.sum(axis=(1, 2))) > 5
    assert volume.spacing == pytest.approx((step * abs(positions[1] / step @ up), pixel, pixel))
    assert volume.values.shape[1] == rows + int(np.ceil(abs((depth - 1) * step * np.sin(tilt))))
    assert volume.values.min() == 0  # what the shift leaves empty is background


def test_slices_beside_each_other_are_no_volume(tmp_path):
    folder = save_dicom(tmp_path / "ct", grid())

    def move(data, number):
        data.ImagePositionPatient = [float(50 * number), 0.0, 3.0 * number]

    refused(lambda: load_volume(edit(folder, move)), "lie beside each other", "no volume")


def test_nested_folders_and_hidden_files(tmp_path):
    folder = save_dicom(tmp_path / "export", grid())
    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        inner = folder / "DICOM" / f"S{number % 2}"
        inner.mkdir(parents=True, exist_ok=True)
        shutil.move(path, inner / f"IM{number}")
    (folder / "DICOMDIR").write_bytes(b"an index")
    (folder / "DICOM" / "._IM0").write_bytes(b"\0\5\x16\7")
    (folder / "DICOM" / ".thumbs.dcm").write_bytes(b"x")
    assert np.array_equal(load_volume(folder).values, grid())


def lut_sequence(entries, first, bits, ow=False):
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries), first, bits])
    item.add_new(
        "LUTData", *(("OW", np.asarray(entries, "<u2").tobytes()) if ow else ("US", [int(entry) for entry in entries]))
    )
    return pydicom.Sequence([item])


@pytest.mark.parametrize("ow", [False, True])
def test_the_modality_lut_is_applied(tmp_path, ow):
    """Stored 1024 means 3071 by the table."""
    stored = np.full((2, 4, 4), 1024, np.float32)
    stored[:, 0] = [0, 1, 4000, 4095]
    folder = save_dicom(tmp_path / "ct", stored / 2 - 1024)

    def table(data, number):
        del data.RescaleSlope, data.RescaleIntercept
        entries = np.arange(4000) * 3
        entries[1024] = 3071
        data.ModalityLUTSequence = lut_sequence(entries, 0, 16, ow)

    values = load_volume(edit(folder, table)).values
    assert (values[:, 1:] == 3071).all()
    assert values[0, 0].tolist() == [0, 3, 11997, 11997]  # beyond the end the last entry

    def break_off(data, number):
        data.ModalityLUTSequence[0].LUTDescriptor = [4095, 0, 16]

    refused(lambda: load_volume(edit(folder, break_off, ["000.dcm"])), "000.dcm: its ModalityLUTSequence is damaged")


def test_a_table_of_8_bits_for_12(tmp_path):
    """The table's entries have 8 bits, positions in it 12."""
    stored = np.zeros((2, 1, 4), np.float32)
    stored[:, 0] = [0, 255, 256, 4095]
    folder = save_dicom(tmp_path / "ct", stored / 2 - 1024)

    def table(data, number):
        data.ModalityLUTSequence = lut_sequence((np.arange(4096) // 16).tolist(), 0, 8)

    assert load_volume(edit(folder, table)).values[0, 0].tolist() == [0, 15, 16, 255]


@pytest.mark.parametrize(("field", "value", "words"), [
    ("RescaleSlope", "NaN", ["its RescaleSlope is nan", "finite number"]),
    ("RescaleIntercept", "inf", ["its RescaleIntercept is inf"]),
    ("RescaleSlope", 0, ["its RescaleSlope is 0"]),
])  # fmt: skip
def test_rescaling_that_is_no_number(tmp_path, field, value, words):
    folder = save_dicom(tmp_path / "ct", grid())

    def spoil(data, number):
        data.add_new(field, "DS", b"1")
        data[field]._value = pydicom.valuerep.DSfloat(float(value), auto_format=False)
        data[field]._value.original_string = str(value)

    refused(lambda: load_volume(edit(folder, spoil, ["001.dcm"])), "001.dcm", *words)


def test_padding_is_background(tmp_path):
    values = grid()
    values[:, 0, 0] = -2000 + 1024  # far below everything
    folder = save_dicom(tmp_path / "ct", values + 1000)
    lowest = float((values + 1000)[:, 1:].min())

    def pad(data, number):
        stored = data.pixel_array.copy()
        stored[0, 1] = 65000  # a range above everything
        data.PixelData = stored.tobytes()
        data.add_new("PixelPaddingValue", "US", 65000)
        data.add_new("PixelPaddingRangeLimit", "US", 65535)

    padded = load_volume(edit(folder, pad)).values
    assert (padded[:, 0, 1] == padded.min()).all()
    assert padded.max() < 2000
    assert lowest >= padded.min()

    def drop_range(data, number):
        del data.PixelPaddingRangeLimit

    again = load_volume(edit(folder, drop_range)).values
    assert np.array_equal(again, padded)


def test_headers_stay_silent_about_the_patient(tmp_path, capfd, recwarn):
    """No message repeats what the header says of a person, also where pydicom's would."""
    folder = save_dicom(tmp_path / "ct", grid())

    def person(data, number):
        data.PatientName, data.PatientID = "DOE^JANE", "SECRET-4711"
        data.add_new("InstanceNumber", "LO", "DOE^JANE SECRET-4711")
        data.add_new("RescaleSlope", "LO", "DOE^JANE SECRET-4711")
        data.add_new("PhotometricInterpretation", "LO", "DOE^JANE SECRET-4711")
        data.add_new("AccessionNumber", "SH", "SECRET-4711")
        del data.ImagePositionPatient

    edit(folder, person)
    recwarn.clear()
    messages = [refused(lambda: load_volume(folder), "dcm")]

    def more(data, number):
        data.add_new("InstanceNumber", "IS", number)
        data.add_new("PixelSpacing", "LO", "DOE^JANE SECRET-4711")

    edit(folder, more)
    recwarn.clear()
    messages.append(refused(lambda: load_volume(folder), "dcm"))
    from llavakit.media import load_image

    messages.append(refused(lambda: load_image(folder / "000.dcm"), "PhotometricInterpretation"))
    output = "".join(capfd.readouterr())
    for text in (*messages, output, *(str(warning.message) for warning in recwarn)):
        assert "DOE" not in text
        assert "SECRET" not in text


def test_limits_hold_for_the_corrected_volume(tmp_path):
    folder = save_dicom(tmp_path / "ct", grid())
    refused(lambda: load_volume(folder, limits=Limits(voxels=100)), "120 voxels, the limit is 100")
    refused(lambda: load_volume(folder, limits=Limits(pixels=20)), "30 pixels")
