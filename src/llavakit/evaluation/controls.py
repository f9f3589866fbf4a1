"""Questions with other pictures than their own: blank ones of the same size, and those of another question."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llavakit.errors import UserError, quoted
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.predictions import media_digest

Media = tuple[Mapping[str, Any], ...]


def blank(source: Any) -> bytes:
    """A black picture of the size of another, as a PNG file."""
    from PIL import Image

    from llavakit.media.image import load_image

    buffer = io.BytesIO()
    Image.new("L", load_image(source).size).save(buffer, "PNG")
    return buffer.getvalue()


def blank_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A content part whose picture is black, whose video's frames are, or whose volume has its lowest value."""
    kind = part["type"]
    if kind == "image":
        return {**part, "image": blank(part["image"])}
    if kind == "video":
        from llavakit.media.video import load_video

        frames = load_video(part["video"]).frames
        return {"type": "video", "video": np.zeros((len(frames), frames[0].height, frames[0].width, 3), np.uint8)}
    if kind == "volume":
        from llavakit.media.volume import load_volume

        voxels = load_volume(part["volume"]).values
        return {"type": "volume", "volume": np.full_like(voxels, voxels.min())}
    return dict(part)


def blanked(questions: Sequence[Question]) -> list[Question]:
    """The questions about blank media of the same sizes."""
    return [_with(question, [tuple(map(blank_part, media)) for media in _media(question)]) for question in questions]


def swapped(questions: Sequence[Question], donors: Sequence[Question], seed: int = 0) -> list[Question]:
    """The questions about the media of another one, which are others by content and of the same kinds.

    Args:
        donors: Where media are taken from.
        seed: Of the choice, which depends on it and on the question's id alone.

    Raises:
        UserError: If there are no other media.
    """
    pool: dict[tuple, dict[str, Question]] = {}  # by kinds, each content once
    for donor in donors:
        pool.setdefault(_kinds(donor), {}).setdefault(_content(donor), donor)
    found = []
    for question in questions:
        own, others = _content(question), pool.get(_kinds(question), {})
        names = [name for name in others if name != own]
        if not names:
            raise UserError(
                f"question {quoted(str(question.question_id))}: there is no other picture to swap its own with"
            )
        chosen = random.Random(f"{seed}/{question.question_id}").choice(names)
        found.append(_with(question, _media(others[chosen])))
    return found


def _media(question: Question) -> list[Media]:
    """The media of every turn."""
    return [tuple(question.media), *(tuple(turn.media) for turn in question.later)]


def _kinds(question: Question) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(part["type"] for part in media) for media in _media(question))


def _content(question: Question) -> str:
    turns = [replace(question, media=media, later=()) for media in _media(question)]
    return " ".join(map(media_digest, turns))


def _with(question: Question, media: Sequence[Media]) -> Question:
    later = tuple(replace(turn, media=own) for turn, own in zip(question.later, media[1:], strict=True))
    return replace(question, media=media[0], later=later)


def is_pictured(question: Question) -> bool:
    """Whether a question has media in any turn."""
    return any(_media(question))


def spread_over(questions: Sequence[Question], most: int) -> list[Question]:
    """At most so many questions, evenly over all."""
    step = max(len(questions) / most, 1.0)
    return [questions[int(number * step)] for number in range(min(most, len(questions)))]
