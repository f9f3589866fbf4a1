"""Which frames of a video are looked at, as arithmetic on counts, rates and time stamps.

Rules that count frames follow the published code of each system to the last rounding; the rule `rate` goes by time
stamps, so videos of variable frame rate are sampled evenly in time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np

from llavakit.errors import MediaError, UserError, quoted
from llavakit.registry import nearest

DEFAULT = {"type": "uniform", "frames": 8}
MOST_FRAMES = 1_000_000


class TooFewFrames(UserError):
    """A video, or a stretch of one, that has fewer frames than are wanted; the message lacks the video's name."""


def uniform(total: int, frames: int) -> list[int]:
    """`frames` numbers from the first frame to the last, truncated; a short video repeats frames (Video-LLaVA)."""
    return np.linspace(0, total - 1, frames).astype(int).tolist()


def every(total: int, frames: int) -> list[int]:
    """Starts of `frames` equal stretches, truncated (transformers' recipe for Video-LLaVA)."""
    return np.arange(0, total, total / frames).astype(int)[:frames].tolist()


def strided(total: int, frames: int) -> list[int]:
    """Every (total // frames)-th frame from the first on; more than `frames` where that is not exact, all frames of a
    short video (LLaVA-NeXT-Interleave's demo)."""
    return list(range(0, total, max(total // frames, 1)))


def midpoints(total: int, frames: int) -> list[int]:
    """Middles of `frames` equal stretches, at most `total` (Video-ChatGPT, LLaVA-Mini); halves round to even."""
    frames = max(min(frames, total), 1)
    bounds = np.round(np.arange(frames + 1) * (float(total - 1) / frames)).astype(int)
    return ((bounds[:-1] + bounds[1:]) // 2).tolist()


def midpoints_per_second(total: int, average_rate: float, max_frames: int | None = None) -> list[int]:
    """`midpoints` with one frame for every full second, at most `max_frames` (LLaVA-Mini)."""
    frames = int(total // average_rate)
    return midpoints(total, frames if max_frames is None else min(frames, max_frames))


def step(
    total: int, average_rate: float, fps: float = 1.0, max_frames: int | None = None, force: bool = False
) -> list[int]:
    """Every round(average_rate / fps)-th frame; `uniform` with `max_frames` if that gives more (LLaVA-OneVision).

    Args:
        total: Frames of the video.
        average_rate: Frames per second.
        fps: Frames wanted per second of video.
        max_frames: Limit; None or 0 for none.
        force: Always take exactly `max_frames`.
    """
    indices = list(range(0, total, max(round(average_rate / fps), 1)))
    if max_frames and (len(indices) > max_frames or force):
        return uniform(total, max_frames)
    return indices


def counted_times(indices: Sequence[int], average_rate: float, sampling: Mapping[str, Any] | None) -> list[float]:
    """Times in seconds that LLaVA-Video's training gave to sampled frames.

    Frames that `step` counted off are timed as if one step were one second, also where `fps` is not 1 or the rate is
    not a whole number; frames spread over the video are timed by its rate.

    Args:
        indices: Numbers of the frames, as `sampling` gave them.
        average_rate: Frames per second.
    """
    options = dict(sampling or DEFAULT)
    stride = max(round(average_rate / options.get("fps", 1.0)), 1)
    regular = list(indices) == list(range(0, len(indices) * stride, stride))
    forced = bool(options.get("force")) and bool(options.get("max_frames"))
    counted = options["type"] == "step" and regular and not forced
    return [index / (stride if counted else average_rate) for index in indices]


def rate(timestamps: Sequence[float], fps: float = 1.0, max_frames: int | None = None) -> list[int]:
    """The frame on screen at every 1/fps seconds; spread evenly in time if that gives more than `max_frames`.

    Args:
        timestamps: Start of every frame in seconds, ascending.
    """
    times = np.asarray(timestamps, dtype=np.float64)
    start, end = float(times[0]), float(times[-1])
    last = int((end - start) * fps + 1e-6)
    if max_frames and last >= max_frames:
        wanted = np.linspace(start, end, max_frames)
    else:
        # Time stamps come from the file and may lie years apart: of the moments that show one frame only the first
        # matters, so there are no more of them to look at than frames (three per frame, for rounding).
        firsts = np.ceil((times - start) * fps)
        ticks = np.unique(np.clip(np.concatenate([firsts - 1, firsts, firsts + 1]), 0, last))
        wanted = start + ticks / fps
    shown = np.searchsorted(times, wanted + 1e-6, side="right") - 1
    return np.unique(shown).tolist()


def everything(total: int) -> list[int]:
    """All frames."""
    return list(range(total))


RULES: dict[str, Callable[..., list[int]]] = {
    "uniform": uniform,
    "every": every,
    "strided": strided,
    "midpoints": midpoints,
    "midpoints_per_second": midpoints_per_second,
    "step": step,
    "rate": rate,
    "all": everything,
}


def choose(
    sampling: Mapping[str, Any] | None, *, total: int, average_rate: float, timestamps: Sequence[float]
) -> list[int]:
    """Numbers of the frames that a rule takes from a video.

    Args:
        sampling: `{"type": rule, **options}`, `DEFAULT` if None. Every rule takes `min_frames`, the fewest frames that
            a video may have.
        total: Frames of the video, at least 1.
        average_rate: Frames per second.
        timestamps: Start of every frame in seconds.

    Raises:
        UserError: If the rule is unknown, an option does not fit, or a number is not positive.
    """
    options = dict(sampling or DEFAULT)
    name = options.pop("type", None)
    if name not in RULES:
        raise UserError(f"sampling: unknown rule {name!r}{nearest(str(name), list(RULES))}")
    least = options.pop("min_frames", None)
    if least is not None and (isinstance(least, bool) or not isinstance(least, int) or least < 1):
        raise UserError(f"sampling.min_frames: must be a whole number of at least 1, got {quoted(least)}")
    if least is not None and total < least:
        raise TooFewFrames(f"has {total} frames, at least {least} are wanted (sampling.min_frames)")
    for key in ("frames", "fps", "max_frames"):
        value = options.get(key)
        if value is None and (key == "max_frames" or key not in options):
            continue
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not (value > 0 or (value == 0 and key == "max_frames")):
            raise UserError(f"sampling.{key}: must be positive, got {quoted(value)}")
        if key != "fps" and (value != int(value) or value > MOST_FRAMES):
            raise UserError(f"sampling.{key}: must be a whole number up to {MOST_FRAMES:,}, got {quoted(value)}")
    known = {"total": total, "average_rate": average_rate, "timestamps": timestamps}
    wanted = inspect.signature(RULES[name]).parameters
    try:
        return RULES[name](**{key: value for key, value in known.items() if key in wanted}, **options)
    except TypeError as error:
        raise UserError(f"sampling {name!r}: {error}") from error


Span = tuple[float, float]


@contextmanager
def named(video: str) -> Iterator[None]:
    """Too few frames are this video's.

    Raises:
        MediaError: With the video's name.
    """
    try:
        yield
    except TooFewFrames as error:
        raise MediaError(f"{video}: {error}") from None


def read_span(start: Any, end: Any) -> Span | None:
    """A stretch of a video in seconds; None if neither bound is given.

    Raises:
        UserError: If a bound is no number of seconds, or the end is not behind the start.
    """
    if start is None and end is None:
        return None
    for name, value in (("start", start), ("end", end)):
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (number and value >= 0):
            raise UserError(f"{name}: must be a number of seconds, at least 0, not {quoted(value)}")
    span = (float(start or 0.0), math.inf if end is None else float(end))
    if not span[0] < span[1]:
        raise UserError(f"end: {span[1]:g} s is not behind the start, {span[0]:g} s")
    return span


def choose_within(
    sampling: Mapping[str, Any] | None, span: Span | None, *, average_rate: float, timestamps: Sequence[float]
) -> list[int]:
    """Numbers of the frames that a rule takes from a stretch of a video, as if there were nothing else.

    Args:
        span: First second and the one at which the stretch is over; None for the whole video.

    Raises:
        UserError: As `choose`, and if the stretch has no frame.
    """
    times = np.asarray(timestamps, dtype=np.float64)
    if span is None:
        return choose(sampling, total=len(times), average_rate=average_rate, timestamps=times)
    first, behind = np.searchsorted(times, [span[0] - 1e-6, span[1] - 1e-6])
    if first >= behind:
        last = float(times[-1])
        raise TooFewFrames(f"has no frame from {span[0]:g} s to {span[1]:g} s; the last one is at {last:g} s")
    own = times[first:behind]
    numbers = choose(sampling, total=len(own), average_rate=average_rate, timestamps=own)
    return [int(first) + number for number in numbers]
