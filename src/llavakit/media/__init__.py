"""Reading media files: images, videos and volumes. Video and volume libraries are imported on first use."""

from __future__ import annotations

from typing import Any

from llavakit.media.image import image_size, load_image
from llavakit.media.source import Limits, name_of

__all__ = ["Limits", "image_size", "load_image", "load_video", "load_volume", "name_of"]


def load_video(source: Any, sampling: Any = None, **options: Any) -> Any:
    """The frames of a video, see `llavakit.media.video.load_video`."""
    from llavakit.media import video as read_video

    return read_video.load_video(source, sampling, **options)


def load_volume(source: Any, **options: Any) -> Any:
    """A volume, see `llavakit.media.volume.load_volume`."""
    from llavakit.media import volume as read_volume

    return read_volume.load_volume(source, **options)
