"""Reviews of two answers by a judge, in the form of LLaVA-Bench: what the judge is shown, and what its reply says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def parse_pair(review: str) -> list[float]:
    """The two scores in the first line of a review; [-1, -1] if it is not exactly two numbers with a space between.

    Commas count as spaces, so "9, 8" (then two spaces) fails as it did in the published evaluation.
    """
    fields = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(field) for field in fields] if len(fields) == 2 else [-1, -1]
    except ValueError:
        return [-1, -1]


def review_content(
    context: str | Sequence[str] | None, question: str, first: str, second: str, rule: str, role: str = "Assistant"
) -> str:
    """What a judge is shown of two answers: context, question, both answers, instruction.

    Args:
        context: Caption of the image, or several that become lines; None where the judge sees the image.
        rule: The instruction to the judge.
        role: What the answers' authors are called.
    """
    parts = [("Question", question)]
    if context is not None:
        parts.insert(0, ("Context", context if isinstance(context, str) else "\n".join(context)))
    blocks = [f"[{name}]\n{text}\n\n" for name, text in parts]
    blocks += [f"[{role} {n}]\n{text}\n\n[End of {role} {n}]\n\n" for n, text in ((1, first), (2, second))]
    return "".join(blocks) + f"[System]\n{rule}\n\n"


def review_record(
    number: int, question: dict[str, Any], first_id: Any, second_id: Any, category: str, reply: str
) -> dict[str, Any]:
    """A review as the published files keep it; `number` counts from 1."""
    return {
        "id": number,
        "question_id": question["question_id"],
        "answer1_id": first_id,
        "answer2_id": second_id,
        "category": category,
        "content": reply,
        "tuple": parse_pair(reply),
    }
