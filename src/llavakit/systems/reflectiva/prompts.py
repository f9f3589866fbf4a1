"""What the model is asked: the question, then about each passage whether it helps, then for the answer.

All three begin alike, with the system text, the picture and the question. Texts are the published ones: the passage
that is judged is stripped, those that are answered from are neither stripped nor separated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llavakit.errors import UserError
from llavakit.registry import nearest
from llavakit.systems.reflectiva.tokens import BEGIN, END, RETRIEVAL

SHORT = ". Give a short answer."


class Frame(NamedTuple):
    """What stands in front of a paragraph and behind it."""

    before: str
    after: str = ""


FRAMES = {
    "template_0": Frame(""),
    "template_1": Frame("Consider this paragraph: "),
    "template_2": Frame("Consider this paragraph to answer: "),
    "template_3": Frame("This may contain useful information to help answer the question correctly: "),
    "template_4": Frame("This may contain relevant information to help answer the question correctly:"),
    "template_rank": Frame(
        "Considering this paragraph: ",
        " assess if it is [Relevant] or [No Relevant] to the question and then give a short answer.",
    ),
}
DEFAULT = "template_1"


def frame_of(name: str) -> Frame:
    """The frame that config.json names as `template_paragraph`.

    Raises:
        UserError: If there is none of this name.
    """
    if name not in FRAMES:
        raise UserError(f"template_paragraph: unknown {name!r}{nearest(name, list(FRAMES))}")
    return FRAMES[name]


def _with_paragraph(messages: Sequence[Mapping[str, Any]], text: str, frame: Frame, end: str = "") -> list[Any]:
    asked = f"{frame.before}{BEGIN}{text}{END}{frame.after}{end}"
    return [*messages, {"role": "assistant", "content": RETRIEVAL}, {"role": "user", "content": asked}]


def judgement(messages: Sequence[Mapping[str, Any]], passage: str, frame: Frame = FRAMES[DEFAULT]) -> list[Any]:
    """The conversation in which the model says whether a passage helps.

    Args:
        messages: The conversation up to the question.
    """
    return _with_paragraph(messages, passage.strip(), frame)


def answer(
    messages: Sequence[Mapping[str, Any]],
    passages: Sequence[str],
    frame: Frame = FRAMES[DEFAULT],
    *,
    short: bool = True,
) -> list[Any]:
    """The conversation in which the model answers from passages.

    Args:
        messages: The conversation up to the question.
        short: Whether a short answer is asked for, as in both published evaluations.
    """
    return _with_paragraph(messages, "".join(passages), frame, SHORT if short else "")
