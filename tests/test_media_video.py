"""Reading of videos that are cut, turned, mirrored, raw, of several tracks, or that lie about their size."""

import io
import struct
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image
from test_media import greys, refused, write_video

from llavakit.errors import MediaError, UserError
from llavakit.media import Limits, load_video
from llavakit.media.frame_sampling import choose, rate, read_span
from llavakit.media.video import displayed
from llavakit.phantom.write import save_video

ALL = {"type": "all"}


def encode(container, stream, count, *, first=0):
    """`count` frames of one grey each, `first` at the beginning, that rise by 8."""
    size = (stream.height, stream.width, 3)
    for index in range(first, first + count):
        frame = av.VideoFrame.from_ndarray(np.full(size, index * 8 % 256, np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def add_stream(container, codec, size=(64, 48), rate=10):
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height = size
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    return stream


def encoder(name):
    try:
        av.Codec(name, "w")
    except ValueError:
        pytest.skip(f"this build of FFmpeg has no {name}")
    return name


def in_order(source):
    """All frames as they come, without any seeking, [frames, height, width, channels]."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def pixels(video):
    return np.stack([np.asarray(frame) for frame in video.frames])


# Cut without encoding again


def cut(source, target, start, end):
    """What `ffmpeg -ss START -to END -c copy` does: packets from the key frame before, times from the cut on."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        first, last = (int(seconds / stream.time_base) for seconds in (start, end))
        old.seek(first, stream=stream, backward=True)
        for packet in old.demux(stream):
            if packet.dts is not None and packet.pts < last:
                packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, copy
                new.mux(packet)
    return target


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_film_cut_without_encoding(tmp_path, codec):
    whole = write_video(tmp_path / "a.mp4", codec=encoder(codec), gop=20)
    part = cut(whole, tmp_path / "b.mp4", 0.7, 1.7)  # frames in front of the cut are there, but not shown
    with av.open(str(part)) as container:
        assert container.streams.video[0].frames > 10
    video = load_video(part, ALL)
    expected = in_order(whole)[7:17]
    assert np.array_equal(pixels(video), expected)
    assert np.allclose(video.timestamps, np.arange(10) / 10)
    assert video.duration == pytest.approx(1.0)
    some = load_video(part, {"type": "uniform", "frames": 3})
    assert np.array_equal(pixels(some), expected[[0, 4, 9]])
    refused(lambda: load_video(part.read_bytes()[:-400]), "bytes>: ")  # what is really cut off stays refused


# Turned and mirrored


def turned(path, matrix):
    """The file with another display matrix: (a, b, c, d) of (x, y) -> (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: 40 bytes up to the matrix
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(content)


EIGHT = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


def by_points(picture, matrix):
    """The picture of which every point is put where the matrix says, pixel by pixel."""
    a, b, c, d = matrix
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]]
    x, y = a * columns + c * rows, b * columns + d * rows
    x, y = x - x.min(), y - y.min()
    shown = np.empty((y.max() + 1, x.max() + 1, 3), picture.dtype)
    shown[y, x] = picture
    return shown


@pytest.mark.parametrize("matrix", EIGHT)
def test_all_eight_orientations(tmp_path, matrix):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32] = 240, 160, 80  # every corner another grey
    path = write_video(tmp_path / "a.mp4", count=2, picture=picture)
    stored = np.asarray(load_video(path, rotate=False).frames[0])
    shown = np.asarray(load_video(turned(path, matrix)).frames[0])
    assert np.array_equal(shown, by_points(stored, matrix))
    assert np.array_equal(
        displayed(stored, [65536 * matrix[0], 65536 * matrix[1], 0, 65536 * matrix[2], 65536 * matrix[3], 0, 0, 0, 0]),
        shown,
    )
    assert np.array_equal(np.asarray(load_video(turned(path, matrix), rotate=False).frames[0]), stored)


def test_other_angles_are_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", count=2)
    tilted = turned(path, (0.866, 0.5, -0.5, 0.866))
    refused(lambda: load_video(tilted), "turned by 30 degrees", "reading.video.rotate=false")
    assert load_video(tilted, rotate=False).size == (8, 48, 64)
    assert load_video(turned(path, (2, 0, 0, 1))).size == (8, 48, 64)  # stretched, not turned


# Several tracks


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_the_default_track_wins(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as container:
        streams = [add_stream(container, "mpeg4", size) for size in ((32, 16), (64, 48))]
        streams[0].disposition, streams[1].disposition = Disposition(0), Disposition.default
        for stream in streams:
            encode(container, stream, 3)
    assert load_video(tmp_path / name, ALL).size == (3, 48, 64)


@pytest.mark.parametrize("flag", [Disposition.attached_pic, Disposition.attached_pic | Disposition.timed_thumbnails])
def test_a_cover_is_no_video(tmp_path, flag):
    with av.open(str(tmp_path / "a.mp3"), "w") as container:
        sound = container.add_stream(encoder("libmp3lame"), rate=44100)
        cover = add_stream(container, "mjpeg", (32, 16), rate=1)
        cover.disposition = flag
        encode(container, cover, 1)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    refused(lambda: load_video(tmp_path / "a.mp3"), "a.mp3", "only a cover picture, no video")


def test_a_cover_does_not_stand_before_the_film(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = add_stream(container, "mjpeg", (32, 16))
        cover.disposition = Disposition.attached_pic
        film = add_stream(container, "mpeg4")
        film.disposition = Disposition(0)
        encode(container, cover, 1)
        encode(container, film, 4)
    assert load_video(tmp_path / "a.mp4", ALL).size == (4, 48, 64)


# Raw streams, and others whose packets say little


@pytest.mark.parametrize(
    ("form", "codec"),
    [
        ("h264", "libx264"),
        ("hevc", "libx265"),
        ("mpeg2video", "mpeg2video"),
        ("m4v", "mpeg4"),
        ("mjpeg", "mjpeg"),
        ("mpeg", "mpeg2video"),
        ("mpegts", "mpeg2video"),
        ("flv", "flv1"),
        ("asf", "mpeg4"),
    ],
)
def test_frames_of_raw_and_other_streams(tmp_path, form, codec):
    """Every frame is the one that was asked for; some of these cannot seek, some call every packet a key frame."""
    path = tmp_path / "a.video"
    with av.open(str(path), "w", format=form) as container:
        stream = add_stream(container, encoder(codec), rate=25)
        stream.options = {"log_level": "none"} if codec == "libx265" else {}
        encode(container, stream, 30)
    expected = in_order(path)
    assert abs(expected.mean(axis=(1, 2, 3)) / 8 - np.arange(30)).max() < 1.5
    for sampling in (ALL, {"type": "uniform", "frames": 7}, {"type": "rate", "fps": 4}):
        video = load_video(path, sampling)
        assert np.array_equal(pixels(video), expected[video.indices]), sampling
        assert np.allclose(video.timestamps, np.array(video.indices) / 25, atol=1e-3)
    assert video.duration == pytest.approx(1.2, abs=0.01)
    assert video.average_rate == pytest.approx(25, abs=0.01)
    assert np.array_equal(pixels(load_video(path.read_bytes(), ALL)), expected)


def test_streams_that_cannot_seek_are_read_whole(tmp_path):
    class Pipe(io.RawIOBase):
        def __init__(self, content):
            self.inner = io.BytesIO(content)

        def read(self, count=-1):
            return self.inner.read(count)

        def seekable(self):
            return False

        def seek(self, *args):
            raise io.UnsupportedOperation("seek")

    content = write_video(tmp_path / "a.mp4", count=5).read_bytes()
    assert greys(load_video(Pipe(content), ALL)) == list(range(5))


def joined(tmp_path, sizes, later):
    """Two MPEG-TS files in one, the second `later` frames after the beginning of the first."""
    parts = b""
    for size, first in zip(sizes, (0, later), strict=True):
        with av.open(str(tmp_path / "a.ts"), "w") as container:
            stream = add_stream(container, "mpeg2video", size)
            for number in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), number, np.uint8), format="rgb24")
                frame.pts, frame.time_base = first + number, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        parts += (tmp_path / "a.ts").read_bytes()
    return parts


def test_the_size_may_not_change(tmp_path):
    content = joined(tmp_path, [(64, 48), (96, 64)], 5)
    refused(lambda: load_video(content, ALL), "changes its size from 64 x 48 to 96 x 64")


def test_time_stamps_that_begin_again(tmp_path):
    content = joined(tmp_path, [(64, 48), (64, 48)], 0)
    refused(lambda: load_video(content, ALL), "5 of its 10 time stamps occur twice", "remux it")
    assert load_video(content, ALL, partial=True).size.depth == 5


# Times


def test_the_announced_duration_wins(tmp_path):
    """Frames at 0, 0.1 ... 0.9 and 1.9 s, the last shown for 0.8 s: 2.7 s, not 1.9 s and one average frame."""
    times = [*range(0, 1000, 100), 1900]
    path = write_video(tmp_path / "a.mp4", count=11, times=times)
    content = bytearray(path.read_bytes())
    with av.open(io.BytesIO(bytes(content))) as container:
        base, old = container.streams.video[0].time_base, container.streams.video[0].duration
        last = old - int(Fraction(19, 10) / base)
    new = int(Fraction(8, 10) / base)
    table = content.index(b"stts") + 4
    entries = struct.unpack_from(">I", content, table + 4)[0]
    at = table + 8 + 8 * (entries - 1)
    assert struct.unpack_from(">II", content, at) == (1, last)
    struct.pack_into(">II", content, at, 1, new)
    for box in (b"mdhd", b"tkhd", b"mvhd", b"elst"):
        place = content.index(box) + 4
        offset = {b"mdhd": 16, b"tkhd": 20, b"mvhd": 16, b"elst": 8}[box]
        scale = struct.unpack_from(">I", content, place + 12)[0] if box in (b"mdhd", b"mvhd") else 1000
        struct.pack_into(">I", content, place + offset, round(2.7 * scale))
    video = load_video(bytes(content), {"type": "rate", "fps": 1})
    assert video.duration == pytest.approx(2.7)
    assert video.indices == [0, 9]


def test_far_time_stamps_allocate_nothing():
    started = time.process_time()
    assert rate([0.0, 1e12], fps=1e6) == [0, 1]
    assert rate([0.0, 5.0, 1e15], fps=1000.0, max_frames=4) == [0, 1, 2]
    many = np.arange(1000) * 1e9
    assert rate(many, fps=30.0) == list(range(1000))
    assert time.process_time() - started < 0.5


def test_a_film_with_far_time_stamps(tmp_path):
    path = write_video(tmp_path / "a.mkv", count=4, times=[0, 1000, 2_000_000_000, 4_000_000_000])
    assert load_video(path, {"type": "rate", "fps": 1000}).indices == [0, 1, 2, 3]


def test_sampling_numbers_are_checked():
    known = {"total": 9, "average_rate": 3.0, "timestamps": [i / 3 for i in range(9)]}
    for options, words in (
        ({"type": "uniform", "frames": "8"}, ["sampling.frames", "'8'"]),
        ({"type": "uniform", "frames": 10**12}, ["sampling.frames", "1,000,000"]),
        ({"type": "uniform", "frames": 2.5}, ["sampling.frames", "whole number"]),
        ({"type": "rate", "fps": float("inf")}, ["sampling.fps"]),
        ({"type": "rate", "fps": float("nan")}, ["sampling.fps"]),
        ({"type": "rate", "max_frames": -1}, ["sampling.max_frames"]),
        ({"type": "rate", "max_frames": True}, ["sampling.max_frames"]),
    ):
        refused(lambda options=options: choose(options, **known), *words)
    assert choose({"type": "step", "max_frames": 0}, **known) == [0, 3, 6]
    assert choose({"type": "rate", "max_frames": None}, **known) == [0, 3, 6]


# Sizes that are only announced


def announced(content, box, count):
    """The film with a table that gives one size for all samples, `count` of them."""
    content = bytearray(content)
    at = content.index(box) + 4
    struct.pack_into(">II", content, at + (4 if box == b"stsz" else 0), 1 if box == b"stsz" else 0, count)
    return bytes(content)


def test_announced_samples_are_compared_with_the_file(tmp_path):
    """FFmpeg would make an entry for each: 1.4 GB and 17 s for 20 million in a file of a few kilobytes."""
    started = time.process_time()
    plain = write_video(tmp_path / "a.mp4").read_bytes()
    parts = {"options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}}
    fragments = write_video(tmp_path / "b.mp4", **parts).read_bytes()
    assert np.array_equal(pixels(load_video(fragments, ALL)), in_order(fragments))
    for content, box in ((plain, b"stsz"), (fragments, b"trun")):
        huge = announced(content, box, 2 * 10**8)
        refused(lambda huge=huge: load_video(huge), "announces 200,000,000 samples", "is damaged")
        hidden = huge.replace(b"moov", b"udta", 1) if box == b"stsz" else huge.replace(b"moof", b"moov")
        refused(lambda hidden=hidden: load_video(hidden), "bytes>: ")
    assert time.process_time() - started < 5


def test_more_frames_than_the_limit(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    refused(lambda: load_video(path, limits=Limits(video_frames=20)), "more than 20 frames")
    assert load_video(path, limits=Limits(video_frames=30)).size.depth == 8


def test_pictures_may_be_larger_than_their_container_says(tmp_path):
    """The stream itself says 1920 x 1088 where the container says 64 x 48."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        encode(container, add_stream(container, encoder("libx264"), (1920, 1088)), 2)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.index(b"avc1", content.index(b"stsd")) + 4 + 24
    assert struct.unpack_from(">HH", content, at) == (1920, 1088)
    struct.pack_into(">HH", content, at, 64, 48)
    refused(lambda: load_video(bytes(content), limits=Limits(pixels=10_000)), "bytes>: ")


def test_metadata_in_other_encodings(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        container.metadata["title"] = "Lunge rechts"
        encode(container, add_stream(container, "mpeg4"), 3)
    content = (tmp_path / "a.avi").read_bytes()
    assert content.count(b"Lunge") == 1
    assert load_video(content.replace(b"Lunge", b"L\xfcnge"), ALL).size.depth == 3


# Folders


def test_frames_of_a_folder_by_their_numbers(tmp_path):
    for number in (1, 2, 10, 9, 100):
        Image.new("RGB", (10, 8), (number,) * 3).save(tmp_path / f"frame{number}.png")
    (tmp_path / "._frame3.png").write_bytes(b"\0\5\x16\7")  # what a Mac leaves beside a file on other disks
    (tmp_path / ".hidden.png").write_bytes(b"")
    video = load_video(tmp_path)
    assert [frame.getpixel((0, 0))[0] for frame in video.frames] == [1, 2, 9, 10, 100]
    for number in (1, 2):
        (tmp_path / f"frame{number}.png").rename(tmp_path / f"frame{number:05}.png")
    assert [frame.getpixel((0, 0))[0] for frame in load_video(str(tmp_path)).frames] == [1, 2, 9, 10, 100]


def test_frames_are_compared_before_they_are_decoded(tmp_path, monkeypatch):
    for number in range(3):
        Image.new("RGB", (10, 8 + number // 2)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    refused(lambda: load_video(tmp_path), "frame 2 is 10 x 9", "one size")
    refused(lambda: load_video(tmp_path, {"type": "uniform", "frames": 2}, limits=Limits(video_pixels=100)), "one size")
    (tmp_path / "2.png").unlink()
    refused(lambda: load_video(tmp_path, limits=Limits(video_pixels=100)), "2 frames of 80 pixels")


# -- stretches --------------------------------------------------------------------------------------------------------


def test_a_stretch_of_a_video_is_sampled_by_time(tmp_path):
    frames = np.zeros((20, 32, 32, 3), np.uint8)
    frames += (np.arange(20, dtype=np.uint8) * 12)[:, None, None, None]
    save_video(tmp_path / "v.mp4", frames)  # 4 frames a second
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}.png")
    for source, options in ((tmp_path / "v.mp4", {}), (folder, {"rate": 4.0}), (list(frames), {"rate": 4.0})):
        video = load_video(source, {"type": "all"}, span=(1.0, 2.5), **options)
        assert (video.indices, video.timestamps[0], video.duration) == ([4, 5, 6, 7, 8, 9], 1.0, 5.0)
        assert abs(int(np.asarray(video.frames[0])[0, 0, 0]) - 48) <= 3
        middle = load_video(source, {"type": "midpoints", "frames": 2}, span=(1.0, 2.5), **options)
        assert middle.indices == [5, 7]
        assert load_video(source, {"type": "all"}, span=read_span(3.0, None), **options).indices == list(range(12, 20))
        with pytest.raises(MediaError, match=r"has no frame from 9 s to 12 s; the last one is at 4\.75 s"):
            load_video(source, {"type": "all"}, span=(9.0, 12.0), **options)
        with pytest.raises(MediaError, match=r"has 6 frames, at least 8 are wanted \(sampling\.min_frames\)"):
            load_video(source, {"type": "uniform", "frames": 8, "min_frames": 8}, span=(1.0, 2.5), **options)
    assert read_span(None, None) is None
    for start, end, problem in ((2, 1, "1 s is not behind"), (-1, None, "start: must be"), (0, "x", "end: must be")):
        with pytest.raises(UserError, match=problem):
            read_span(start, end)
