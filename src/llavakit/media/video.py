"""Reading of videos: which frames there are from the packets alone, then only the wanted ones decoded."""

from __future__ import annotations

import bisect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llavakit.errors import MediaError
from llavakit.media.frame_sampling import choose
from llavakit.media.image import load_image
from llavakit.media.source import Limits, MediaSize, Source, check_file, check_pixels, looks_like, name_of, reason

_WANTED = "MP4, WebM, MKV, MOV, AVI or GIF"
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_CONTAINERS = ("MP4 or MOV file", "AVI file", "Matroska or WebM file")
_COMPLETE = 0.9  # share of the announced frames below which a file counts as cut off


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
    source: Source | Sequence[Any],
    sampling: Mapping[str, Any] | None = None,
    *,
    limits: Limits = Limits(),
    partial: bool = False,
    rotate: bool = True,
    rate: float = 1.0,
) -> Video:
    """The frames of a video that a sampling rule takes.

    Args:
        source: Path or content of a file, a folder of images (frames in order of name), or a sequence of images.
        sampling: `{"type": rule, **options}`, see `llavakit.media.frame_sampling`; None takes 8 frames from a
            file, and all of a folder or a sequence.
        limits: What is refused.
        partial: Accept a file that is cut off or damaged and use what can be decoded.
        rotate: Turn frames upright as the file notes (telephones store them turned).
        rate: Frames per second of a folder or sequence, which have no times.

    Raises:
        MediaError: If there is no video in it, it is cut off or damaged, or breaks a limit.
    """
    if isinstance(source, (list, tuple)) or (isinstance(source, (str, Path)) and Path(source).is_dir()):
        return _from_images(source, sampling, limits, rate)
    check_file(source, limits, _WANTED)
    import av

    name = name_of(source)
    in_memory = isinstance(source, (bytes, bytearray, memoryview))
    with io.BytesIO(source) if in_memory else Path(source).open("rb") as handle:
        try:
            # Given as an open file and without protocols, a playlist cannot make the demuxer open anything else.
            container = av.open(handle, options={"protocol_whitelist": "none"})
        except (av.error.FFmpegError, ValueError, OSError) as error:
            hint = looks_like(source)
            if hint.endswith(_CONTAINERS):
                hint += " and is cut off or damaged"
            raise MediaError(
                f"{name}: is not a readable video ({_ffmpeg_reason(error)}); {hint}; it should be {_WANTED}"
            ) from None
        with container:
            if not container.streams.video:
                raise MediaError(f"{name}: holds no video stream; it should be {_WANTED} with a picture")
            return _Reader(container, name, limits, partial).read(sampling, rotate)


class _Reader:
    """Reads one open container."""

    def __init__(self, container: Any, name: str, limits: Limits, partial: bool) -> None:
        import av

        self.container, self.name, self.limits, self.partial = container, name, limits, partial
        self.damage: tuple[type[Exception], ...] = (av.error.FFmpegError, ValueError, EOFError)
        self.stream = container.streams.video[0]
        if self.stream.codec_context is None:
            raise MediaError(
                f"{name}: the format of its pictures is unknown or cut off; copy it again, or convert it to {_WANTED}"
            )
        self.stream.thread_type = "AUTO"
        check_pixels(name, self.stream.codec_context.width, self.stream.codec_context.height, limits)

    def read(self, sampling: Mapping[str, Any] | None, rotate: bool) -> Video:
        times, keys = self._scan()
        if not times:
            raise MediaError(f"{self.name}: its video stream has no frames")
        base = float(self.stream.time_base)
        timestamps = [(time - times[0]) * base for time in times]
        duration, average_rate = self._span(timestamps)
        indices = choose(sampling, total=len(times), average_rate=average_rate, timestamps=timestamps)
        self._check(len(set(indices)), len(times))
        pictures = self._decode([times[index] for index in sorted(set(indices))], keys, rotate)
        frames = [pictures[times[index]] for index in indices]
        size = MediaSize(len(frames), frames[0].height, frames[0].width)
        return Video(frames, [timestamps[i] for i in indices], size, indices, duration, average_rate)

    def _scan(self) -> tuple[list[int], list[int]]:
        """Presentation times of all frames and of the key frames, ascending, without decoding."""
        times, keys, unknown = set(), [], False
        try:
            for packet in self.container.demux(self.stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                if packet.pts is None:
                    unknown = True
                    continue
                times.add(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        except self.damage as error:
            if not self.partial:
                raise MediaError(f"{self.name}: is damaged ({_ffmpeg_reason(error)}); copy it again") from None
        if unknown:
            return self._scan_decoding(), []
        if times and not self.partial:
            self._refuse_cut_off(len(times), max(times))
        return sorted(times), sorted(keys)

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
        parts = tag.split(":")
        if len(parts) == 3 and all(part.replace(".", "", 1).isdigit() for part in parts):
            return int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2])
        alone = len(self.container.streams) == 1
        return self.container.duration / 1e6 if alone and self.container.duration else 0.0

    def _scan_decoding(self) -> list[int]:
        """Times of files whose packets have none: only decoding tells them."""
        self._rewind()
        times = []
        try:
            times = [frame.pts for frame in self.container.decode(self.stream) if frame.pts is not None]
        except self.damage as error:
            if not self.partial:
                raise MediaError(f"{self.name}: is damaged ({_ffmpeg_reason(error)}); copy it again") from None
        return sorted(set(times))

    def _rewind(self) -> None:
        self.container.seek(0)

    def _span(self, timestamps: list[float]) -> tuple[float, float]:
        """Duration in seconds and frames per second."""
        last = timestamps[-1]
        rate = float(self.stream.average_rate or 0) or ((len(timestamps) - 1) / last if last > 0 else 1.0)
        return max(self._announced_seconds(), last + 1 / rate), rate

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

    def _decode(self, wanted: list[int], keys: list[int], rotate: bool) -> dict[int, Image.Image]:
        """The pictures shown at the wanted times; skips to the key frame before each where that saves decoding."""
        found: dict[int, Image.Image] = {}
        self._rewind()
        frames = self.container.decode(self.stream)
        position, last = None, None
        error_text = ""
        for time in wanted:
            key = keys[bisect.bisect_right(keys, time) - 1] if keys and keys[0] <= time else None
            if key is not None and (position is None or key > position) and key != keys[0]:
                self.container.seek(key, stream=self.stream, backward=True)
                frames = self.container.decode(self.stream)
            while position is None or position < time:
                try:
                    frame = next(frames)
                except StopIteration:
                    break
                except self.damage as error:
                    error_text = _ffmpeg_reason(error)
                    break
                if frame.pts is None:
                    continue
                position, last = frame.pts, frame
            if last is not None and last.pts >= time:
                found[time] = self._picture(last, rotate)
        return self._complete(found, wanted, error_text)

    def _complete(self, found: dict[int, Image.Image], wanted: list[int], error: str) -> dict[int, Image.Image]:
        """Fill frames that could not be decoded with the one before, if the user accepts a damaged file."""
        if not found:
            raise MediaError(f"{self.name}: none of its frames can be decoded ({error or 'no picture came out'})")
        missing = [time for time in wanted if time not in found]
        # Decoders may keep back the very last frame of a stream; one frame is not worth a refusal.
        if missing and not self.partial and (error or missing != wanted[-1:]):
            raise MediaError(
                f"{self.name}: {len(missing)} of {len(wanted)} frames cannot be decoded"
                f" ({error or 'the stream ends early'}); copy it again, or take what there is (reading.video.partial)"
            )
        previous = found[min(found)]
        for time in wanted:
            previous = found.setdefault(time, previous)
        return found

    def _picture(self, frame: Any, rotate: bool) -> Image.Image:
        pixels = frame.to_ndarray(format="rgb24")
        turns = round(getattr(frame, "rotation", 0) / 90) % 4 if rotate else 0
        return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels)


def _ffmpeg_reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or reason(error)


def _from_images(source: Any, sampling: Mapping[str, Any] | None, limits: Limits, rate: float) -> Video:
    name = name_of(source) if not isinstance(source, (list, tuple)) else f"<{len(source)} frames>"
    if isinstance(source, (list, tuple)):
        items = list(source)
    else:
        items = sorted(path for path in Path(source).iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not items:
        raise MediaError(f"{name}: holds no frames; a folder of frames holds JPEG or PNG files")
    timestamps = [index / rate for index in range(len(items))]
    rule = {"type": "all"} if sampling is None else sampling
    indices = choose(rule, total=len(items), average_rate=rate, timestamps=timestamps)
    if len(indices) > limits.frames:
        raise MediaError(f"{name}: {len(indices):,} frames were asked for, the limit is {limits.frames:,}")
    frames = []
    for index in indices:
        item = Image.fromarray(items[index]) if isinstance(items[index], np.ndarray) else items[index]
        frames.append(load_image(item, limits=limits))
        if frames[-1].size != frames[0].size:
            raise MediaError(
                f"{name}: frame {index} is {frames[-1].width} x {frames[-1].height}, the first is"
                f" {frames[0].width} x {frames[0].height}; all frames must have one size"
            )
    size = MediaSize(len(frames), frames[0].height, frames[0].width)
    return Video(frames, [timestamps[index] for index in indices], size, indices, len(items) / rate, rate)
