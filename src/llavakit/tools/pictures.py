"""Sizes in which pictures are shown in a chat and sent to a model beside tools."""

from __future__ import annotations

SHORT, LONG = 400, 800  # most pixels of the short and the long side


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in which a picture is shown: at most `SHORT` and `LONG`, never larger than it is.

    Source: `Conversation.get_images` of LLaVA.
    """
    width, height = size
    ratio = max(size) / min(size)
    short = int(min(LONG / ratio, SHORT, min(size)))
    long = int(short * ratio)
    return (long, short) if width > height else (short, long)
