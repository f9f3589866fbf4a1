"""Reading of videos: which frames there are from the packets alone, then only the wanted ones decoded."""

from __future__ import annotations

import bisect
import io
import math
import os
import re
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from llavakit.errors import MediaError
from llavakit.media.frame_sampling import Span, choose_within, named
from llavakit.media.mp4_index import check_index
from llavakit.media.source import (
    PIXEL_BYTES,
    Limits,
    MediaSize,
    check_pixels,
    looks_like,
    name_of,
    opened,
    reading,
    reason,
)

_WANTED = "MP4, WebM, MKV, MOV, AVI or GIF"
_CONTAINERS = ("MP4 or MOV file", "AVI file", "Matroska or WebM file")
_COMPLETE = 0.9  # share of the announced frames below which a file counts as cut off
_FASTEST = 10_000  # frames per second; what headers say beyond that is no rate
_NO_TIMESTAMPS = 128  # FFmpeg's flag of raw streams (AVFMT_NOTIMESTAMPS)
_LONGEST = 2**62  # units of time between the first and the last frame


class Video(NamedTuple):
    """Frames taken from a video.

    Attributes:
        frames: RGB images of one size.
        timestamps: Seconds from the start of the video, per frame.
        size: (frames, height, width).
        indices: Number of every frame among all frames of the video.
        duration: Seconds of the whole video.
        average_rate: Frames per second of the whole video.
    """

    frames: list[Image.Image]
    timestamps: list[float]
    size: MediaSize
    indices: list[int]
    duration: float
    average_rate: float


def load_video(
    source: Any,
    sampling: Mapping[str, Any] | None = None,
    *,
    limits: Limits = Limits(),
    partial: bool = False,
    rotate: bool = True,
    rate: float = 1.0,
    span: Span | None = None,
) -> Video:
    """The frames of a video that a sampling rule takes.

    Of several video tracks the default one is read, and of no other kind of picture: covers and thumbnails are none.

    Args:
        source: Path, http(s) or data URL, content of a file, open file, a folder of images (frames in the order of
            the numbers in their names), a sequence of images, or an array [frames, height, width, channels].
        sampling: `{"type": rule, **options}`, see `llavakit.media.frame_sampling`; None takes 8 frames from a
            file, and all of a folder or a sequence.
        limits: What is refused.
        partial: Accept a file that is cut off or damaged and use what can be decoded.
        rotate: Turn and mirror frames as the file notes (telephones store them turned), as a player does.
        rate: Frames per second of a folder or sequence, which have no times.
        span: Seconds (first, behind the last) of the stretch to sample from; None for the whole video.

    Raises:
        MediaError: If there is no video in it, it is cut off or damaged, or breaks a limit.
    """
    many = isinstance(source, (list, tuple)) or hasattr(source, "__array__")
    if many or (isinstance(source, (str, os.PathLike)) and os.path.isdir(source)):
        from llavakit.media.frame_folder import load_frames

        return load_frames(source, sampling, limits=limits, rate=rate, span=span)
    name = name_of(source)
    source = opened(source, limits, _WANTED)
    with (
        reading(name, "cannot be read as a video"),
        source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file,
    ):
        check_index(file, name, limits)
        reader = _Reader(file, name, limits, partial, lambda: looks_like(source))
        with closing(reader):
            return reader.read(sampling, rotate, span)


class _Reader:
    """Reads one open file."""

    def __init__(
        self, file: BinaryIO, name: str, limits: Limits, partial: bool, looks: Callable[[], str] = lambda: ""
    ) -> None:
        import av

        self.file, self.name, self.limits, self.partial = file, name, limits, partial
        self.damage: tuple[type[Exception], ...] = (av.error.FFmpegError, ValueError, EOFError)
        try:
            self._open()
        except self.damage as error:
            hint = looks()
            if hint.endswith(_CONTAINERS):
                hint += " and is cut off or damaged"
            raise MediaError(
                f"{name}: is not a readable video ({_ffmpeg_reason(error)}); {hint}; it should be {_WANTED}"
            ) from None
        self.packets, self.error = 0, ""
        self.untimed = False  # packets and frames carry no times: frames are known by their number

    def close(self) -> None:
        """Close the container, not the file."""
        self.container.close()

    def _open(self) -> None:
        """Open the file from its beginning."""
        import av

        self.file.seek(0)
        # Given as an open file and without protocols, a playlist cannot make the demuxer open anything else.
        options = {"protocol_whitelist": "none", "max_pixels": str(max(self.limits.pixels, Limits.pixels))}
        self.container = av.open(self.file, options=options, metadata_errors="replace")
        self.stream = self._choose_stream()
        if self.stream.codec_context is None:
            raise MediaError(
                f"{self.name}: the format of its pictures is unknown or cut off; copy it again, or convert it to"
                f" {_WANTED}"
            )
        self.stream.thread_type = "AUTO"

    def _choose_stream(self) -> Any:
        """The video track: the default one of those that are no covers and thumbnails."""
        from av.stream import Disposition

        stills = Disposition.attached_pic | Disposition.timed_thumbnails
        videos = [stream for stream in self.container.streams.video if not stream.disposition & stills]
        if not videos:
            what = "only a cover picture, no video" if self.container.streams.video else "no video stream"
            raise MediaError(f"{self.name}: holds {what}; it should be {_WANTED} with a picture")
        return next((stream for stream in videos if stream.disposition & Disposition.default), videos[0])

    def read(self, sampling: Mapping[str, Any] | None, rotate: bool, span: Span | None = None) -> Video:
        self._check_size()
        times, keys, last = self._scan()
        if not len(times):
            raise MediaError(f"{self.name}: its video stream has no frames")
        if int(times[-1]) - int(times[0]) > _LONGEST:
            raise MediaError(f"{self.name}: its time stamps are damaged; copy it again")
        base = 1 / self._rate_of_header() if self.untimed else float(self.stream.time_base)
        timestamps = (times - times[0]) * base
        duration, average_rate = self._span(timestamps, last * base)
        with named(self.name):
            indices = choose_within(sampling, span, average_rate=average_rate, timestamps=timestamps)
        chosen = sorted(set(indices))
        self._check(len(chosen), len(times))
        wanted = times[chosen].tolist()
        pictures = dict(zip(chosen, self._decode(wanted, keys, rotate), strict=True))
        frames = [pictures[index] for index in indices]
        size = MediaSize(len(frames), frames[0].height, frames[0].width)
        return Video(frames, timestamps[indices].tolist(), size, indices, duration, average_rate)

    def _check_size(self) -> None:
        context = self.stream.codec_context
        if context.width < 1:
            raise MediaError(f"{self.name}: its pictures have no size, or one far beyond {self.limits.pixels:,} pixels")
        check_pixels(self.name, context.width, context.height, self.limits)
        context.options = {"max_pixels": str(self.limits.pixels)}  # what its packets say may be another size

    def _scan(self) -> tuple[np.ndarray, list[int], int]:
        """Presentation times of all frames and of the key frames, ascending, and how long the last is shown.

        Nothing is decoded. Discarded packets count as being there: a lossless cut leaves them in front of its first
        frame, because the decoder needs them.
        """
        times, keys, unknown = array("q"), [], False
        end = (-_LONGEST, 0)
        try:
            for packet in self.container.demux(self.stream):
                if packet.size == 0:
                    continue
                self.packets += 1
                self._check_count(self.packets)
                if packet.is_discard:
                    continue
                if packet.pts is None:
                    unknown = True
                    continue
                times.append(packet.pts)
                end = max(end, (packet.pts, packet.duration or 0))
                if packet.is_keyframe:
                    keys.append(packet.pts)
        except self.damage as error:
            if not self.partial:
                raise MediaError(f"{self.name}: is damaged ({_ffmpeg_reason(error)}); copy it again") from None
        if unknown:
            return self._scan_decoding(), [], 0
        found = np.unique(np.frombuffer(times, np.int64))
        if times and not self.partial:
            self._refuse_cut_off(self.packets, max(times))
            if len(found) < _COMPLETE * len(times):
                twice = f"{len(times) - len(found)} of its {len(times)} time stamps occur twice"
                advice = "remux it (ffmpeg -i IN -c copy OUT)"
                raise MediaError(f"{self.name}: {twice}, as in files that were joined byte by byte; {advice}")
        return found, sorted(keys), end[1]

    def _check_count(self, frames: int) -> None:
        if frames > self.limits.video_frames:
            raise MediaError(f"{self.name}: has more than {self.limits.video_frames:,} frames, which is the limit")

    def _refuse_cut_off(self, frames: int, last: int) -> None:
        announced = self.stream.frames
        if announced and frames < _COMPLETE * announced:
            raise MediaError(f"{self.name}: is cut off: {frames} of {announced} frames are there; copy it again")
        seconds, end = self._announced_seconds(), float(last * self.stream.time_base)
        # One frame may last long, so a short difference says nothing.
        if not announced and seconds - end > max(1.0, (1 - _COMPLETE) * seconds):
            raise MediaError(
                f"{self.name}: is cut off: its pictures end at {end:.1f} of {seconds:.1f} s; copy it again"
            )

    def _announced_seconds(self) -> float:
        """How long the header says the video lasts; 0 if it does not say."""
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        tag = {key.upper(): value for key, value in self.stream.metadata.items()}.get("DURATION", "")
        if match := re.fullmatch(r"([0-9]{1,6}):([0-9]{1,2}):([0-9]{1,2}(?:\.[0-9]*)?)", tag):
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        alone = len(self.container.streams) == 1
        return self.container.duration / 1e6 if alone and self.container.duration else 0.0

    def _scan_decoding(self) -> np.ndarray:
        """Times of files whose packets have none: only decoding tells them, or how many frames there are."""
        self._rewind()
        times, frames = array("q"), 0
        try:
            for frame in self.container.decode(self.stream):
                frames += 1
                self._check_count(frames)
                if frame.pts is not None:
                    times.append(frame.pts)
        except self.damage as error:
            if not self.partial:
                raise MediaError(f"{self.name}: is damaged ({_ffmpeg_reason(error)}); copy it again") from None
        self.untimed = not times
        return np.arange(frames) if self.untimed else np.unique(np.frombuffer(times, np.int64))

    def _rewind(self) -> None:
        """Go back to the first packet; a raw stream that cannot seek is opened again."""
        try:
            self.container.seek(0)
        except self.damage:
            self.container.close()
            self._open()
            self._check_size()

    def _rate_of_header(self) -> float:
        """Frames per second by the header, 25 if it does not say."""
        rate = float(self.stream.average_rate or 0)
        return rate if 0 < rate <= _FASTEST else 25.0

    def _span(self, timestamps: np.ndarray, last_lasts: float) -> tuple[float, float]:
        """Duration in seconds and frames per second.

        The duration is what the file announces; if that is nothing, or less than the frames need, the time at which
        the last frame ends.
        """
        last = float(timestamps[-1])
        rate = float(self.stream.average_rate or 0)
        if not 0 < rate <= _FASTEST:
            rate = min((len(timestamps) - 1) / last, _FASTEST) if last > 0 else 1.0
        announced = self._announced_seconds()
        return (announced if announced > last else last + (last_lasts or 1 / rate)), rate

    def _check(self, wanted: int, total: int) -> None:
        if wanted > self.limits.frames:
            raise MediaError(
                f"{self.name}: {wanted:,} of {total:,} frames were asked for, the limit is {self.limits.frames:,};"
                " sample fewer (max_frames)"
            )
        picture = self.stream.codec_context.width * self.stream.codec_context.height
        if wanted * picture > self.limits.video_pixels:
            raise MediaError(
                f"{self.name}: {wanted:,} frames of {picture:,} pixels exceed the limit of"
                f" {self.limits.video_pixels:,} pixels; sample fewer (max_frames)"
            )
        self.limits.claim(self.name, wanted * picture * PIXEL_BYTES)

    def _timed_frames(self) -> Iterator[tuple[int, Any]]:
        """Frames as they are decoded from here on, each with its time (or its number, if the file has no times)."""
        for number, frame in enumerate(self.container.decode(self.stream)):
            if self.untimed:
                yield number, frame
            elif frame.pts is not None:
                yield frame.pts, frame

    def _decode(self, wanted: list[int], keys: list[int], rotate: bool) -> list[Image.Image]:
        """The pictures shown at the wanted times."""
        found = self._by_seeking(wanted, keys, rotate) if self._can_seek(keys) else {}
        missing = [time for time in wanted if time not in found]
        if missing:
            found |= self._in_order(missing, rotate)
        return self._complete(found, wanted)

    def _can_seek(self, keys: list[int]) -> bool:
        """Whether decoding can begin in the middle: raw streams count their times from wherever they begin."""
        return len(keys) > 1 and not self.container.format.flags & _NO_TIMESTAMPS

    def _by_seeking(self, wanted: list[int], keys: list[int], rotate: bool) -> dict[int, Image.Image]:
        """The frames of exactly these times; skips to the key frame before each where that saves decoding.

        Containers without an index (MPEG-TS, MPEG-PS) seek by guessing and often land behind the frame; what is missed
        is left out.
        """
        found: dict[int, Image.Image] = {}
        self._rewind()
        frames, position = self._timed_frames(), None
        for time in wanted:
            key = keys[max(bisect.bisect_right(keys, time) - 1, 0)]
            frame = None
            try:
                if key != keys[0] and (position is None or key > position):
                    self.container.seek(key, stream=self.stream, backward=True)
                    frames = self._timed_frames()
                    position = None
                while position is None or position < time:
                    position, frame = next(frames)
            except StopIteration:
                continue
            except self.damage as error:
                self.error = _ffmpeg_reason(error)
                continue
            if position == time and frame is not None:
                found[time] = self._picture(frame, rotate)
                self._check_one_size(found[time], found[min(found)])
        return found

    def _in_order(self, wanted: list[int], rotate: bool) -> dict[int, Image.Image]:
        """The frames that a player would show at these times, decoded from the beginning.

        Usually these are the frames of exactly these times; of a film in fields, half of the packets' times have none.
        """
        found: dict[int, Image.Image] = {}
        self._rewind()
        frames = self._timed_frames()
        shown = following = None
        for time in wanted:
            try:
                while shown is None or shown[0] < time:
                    following = following or next(frames)
                    if following[0] > time and shown is not None:
                        break
                    shown, following = following, None
            except StopIteration:
                break
            except self.damage as error:
                self.error = _ffmpeg_reason(error)
                break
            found[time] = self._picture(shown[1], rotate)
            self._check_one_size(found[time], found[min(found)])
        return found

    def _check_one_size(self, picture: Image.Image, first: Image.Image) -> None:
        check_pixels(self.name, *picture.size, self.limits)
        if picture.size != first.size:
            raise MediaError(
                f"{self.name}: changes its size from {first.width} x {first.height} to {picture.width} x"
                f" {picture.height}; convert it to one size"
            )

    def _complete(self, found: dict[int, Image.Image], wanted: list[int]) -> list[Image.Image]:
        """Fill frames that could not be decoded with the one before, if the user accepts a damaged file."""
        error = self.error
        if not found:
            raise MediaError(f"{self.name}: none of its frames can be decoded ({error or 'no picture came out'})")
        missing = [time for time in wanted if time not in found]
        # Decoders may keep back the very last frame of a stream; one frame is not worth a refusal.
        if missing and not self.partial and (error or missing != wanted[-1:]):
            raise MediaError(
                f"{self.name}: {len(missing)} of {len(wanted)} frames cannot be decoded"
                f" ({error or 'the stream ends early'}); copy it again, or take what there is (reading.video.partial)"
            )
        previous, pictures = found[min(found)], []
        for time in wanted:
            previous = found.get(time, previous)
            pictures.append(previous)
        return pictures

    def _picture(self, frame: Any, rotate: bool) -> Image.Image:
        check_pixels(self.name, frame.width, frame.height, self.limits)
        pixels = frame.to_ndarray(format="rgb24")
        if rotate and (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
            pixels = displayed(pixels, struct.unpack("=9i", bytes(matrix)), self.name)
        return Image.fromarray(np.ascontiguousarray(pixels))


def displayed(pixels: np.ndarray, matrix: Sequence[int], name: str = "") -> np.ndarray:
    """A stored picture as a player shows it.

    Args:
        pixels: [height, width, channels].
        matrix: The nine numbers of a display matrix, by rows: a stored point (x, y) is shown at
            (matrix[0] x + matrix[3] y, matrix[1] x + matrix[4] y), shifted and scaled into view.

    Raises:
        MediaError: If it is turned by no multiple of a quarter turn.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    tilt = 0.02  # about one degree, from which on FFmpeg turns by the angle
    if max(abs(b), abs(c)) <= tilt * min(abs(a), abs(d)):
        right, down = a, d
    elif max(abs(a), abs(d)) <= tilt * min(abs(b), abs(c)):
        pixels, right, down = pixels.swapaxes(0, 1), c, b
    else:
        angle = math.degrees(math.atan2(b, a))
        raise MediaError(
            f"{name}: is shown turned by {angle:.0f} degrees; only quarter turns are read (reading.video.rotate=false"
            " reads it as it is stored)"
        )
    return pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def _ffmpeg_reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or reason(error)
