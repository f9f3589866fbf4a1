"""Videos that are given by their frames: a folder of images, or a sequence of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.errors import MediaError
from llavakit.media.frame_sampling import Span, choose_within, named
from llavakit.media.image import image_size, load_image
from llavakit.media.source import Limits, MediaSize, name_of, reading
from llavakit.media.video import Video

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def load_frames(
    source: str | os.PathLike[str] | Sequence[Any] | np.ndarray,
    sampling: Mapping[str, Any] | None,
    *,
    limits: Limits,
    rate: float,
    span: Span | None = None,
) -> Video:
    """The frames that a sampling rule takes from a folder, from a sequence of images, or from an array of them.

    See `llavakit.media.video.load_video`. Sizes are compared before anything is decoded.
    """
    if isinstance(source, (str, os.PathLike)):
        name, items = name_of(source), frames_of(Path(source))
    else:
        items = list(source) if isinstance(source, (list, tuple)) else list(np.asarray(source))
        name = f"<{len(items)} frames>"
    if not items:
        raise MediaError(f"{name}: holds no frames; a folder of frames holds JPEG or PNG files")
    if not rate > 0:
        raise MediaError(f"{name}: rate must be positive, got {rate!r}")
    timestamps = np.arange(len(items)) / rate
    rule = {"type": "all"} if sampling is None else sampling
    with named(name):
        indices = choose_within(rule, span, average_rate=rate, timestamps=timestamps)
    chosen = sorted(set(indices))
    if len(chosen) > limits.frames:
        raise MediaError(f"{name}: {len(chosen):,} frames were asked for, the limit is {limits.frames:,}")
    sizes = {index: image_size(items[index], limits=limits) for index in chosen}
    first = sizes[chosen[0]]
    for index, size in sizes.items():
        if size != first:
            raise MediaError(
                f"{name}: frame {index} is {size.width} x {size.height}, the first is {first.width} x {first.height};"
                " all frames must have one size"
            )
    if len(chosen) * first.width * first.height > limits.video_pixels:
        raise MediaError(
            f"{name}: {len(chosen):,} frames of {first.width * first.height:,} pixels exceed the limit of"
            f" {limits.video_pixels:,} pixels; sample fewer (max_frames)"
        )
    pictures = {index: load_image(items[index], limits=limits) for index in chosen}
    frames = [pictures[index] for index in indices]
    size = MediaSize(len(frames), frames[0].height, frames[0].width)
    return Video(frames, timestamps[indices].tolist(), size, indices, len(items) / rate, rate)


def frames_of(folder: Path) -> list[Path]:
    """The images of a folder in the order of the numbers in their names; hidden files are no frames."""
    with reading(name_of(folder), "cannot be listed"):
        found = [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.name[0] != "."]
    return sorted(found, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A name in pieces that compare as a person would: `frame2` before `frame10`."""
    return [(0, int(piece)) if piece[0] in "0123456789" else (1, piece) for piece in re.findall("[0-9]+|[^0-9]+", name)]
