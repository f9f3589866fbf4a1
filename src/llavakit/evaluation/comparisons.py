"""How a judge is asked which of two answers is better, by registered name: what it sees, and what its reply means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Verdict = Literal["first", "second", "tie"]


class Comparison:
    """Base of ways to compare two answers.

    Attributes:
        max_tokens: Longest reply of the judge.
    """

    max_tokens = 1024

    def messages(
        self, media: Sequence[Mapping[str, Any]], question: str, first: str, second: str
    ) -> list[dict[str, Any]]:
        """What the judge is asked; `media` are the content parts that the question is about."""
        raise NotImplementedError

    def verdict(self, reply: str) -> Verdict | None:
        """Which answer the reply calls better; None if it does not say. Takes any text."""
        raise NotImplementedError


class Labelled(Comparison):
    """`labelled`: a reason, and then one of three labels. For judges that were not trained on a prompt of their own."""

    def messages(
        self, media: Sequence[Mapping[str, Any]], question: str, first: str, second: str
    ) -> list[dict[str, Any]]:
        text = (
            "Two assistants answered the question below. Say which answer is better: right first of all, then helpful "
            "and to the point. Do not let the order or the length of the answers decide.\n\n"
            f"Question:\n{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
            "Give your reasons in a few sentences. End with [[A]] if answer A is better, [[B]] if answer B is better, "
            "or [[C]] if neither is."
        )
        return [{"role": "user", "content": [*map(dict, media), {"type": "text", "text": text}]}]

    def verdict(self, reply: str) -> Verdict | None:
        labels = re.findall(r"\[\[([ABC])\]\]", reply)
        return {"A": "first", "B": "second", "C": "tie"}[labels[-1]] if labels else None
