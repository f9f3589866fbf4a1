"""Answers as the published scripts cut them, and free text as one of a benchmark's classes."""

from __future__ import annotations

from collections.abc import Sequence


def published_answer(text: str, stops: Sequence[str]) -> str:
    """A reply as Video-ChatGPT's scripts leave it: trailing characters of the stop string are stripped, one by one.

    It takes the last letter of "Two graspers" for a part of "</s>". For comparison with published figures alone.
    """
    for stop in stops:
        text = text.strip().rstrip(stop)
    return text.strip()
