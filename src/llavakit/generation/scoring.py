"""Likelihoods of given replies: which ids are scored, and how the numbers are summed up.

A reply is scored as the text that follows its context: both are tokenised together, and the ids are cut where those of
the context end, because tokenised alone a reply would begin with ids that no training text has in this place. Blanks at
the end of the context belong to the reply. A scored sequence begins with exactly one begin token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llavakit.errors import UserError


@dataclass(frozen=True)
class Score:
    """Log-likelihood of one reply.

    Attributes:
        token_ids: The ids that were scored.
        logprobs: Log probability of each.
        characters: Length of the reply as it was given.
        likeliest: Whether each id is the likeliest one in its place; None if that was not looked at.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    characters: int
    likeliest: bool | None = None

    @property
    def sum(self) -> float:
        """Log-likelihood of the whole reply ("acc" of lm-evaluation-harness ranks by it)."""
        return float(sum(self.logprobs))

    @property
    def per_token(self) -> float:
        """Mean over tokens."""
        return self.sum / len(self.logprobs)

    @property
    def per_character(self) -> float:
        """Mean over characters ("acc_norm")."""
        return self.sum / self.characters


def best(scores: Sequence[Score], by: str = "sum") -> int:
    """Number of the reply with the highest `sum`, `per_token` or `per_character`; of equals the first."""
    values = [getattr(score, by) for score in scores]
    return values.index(max(values))


def check_replies(replies: Sequence[str]) -> None:
    """Refuse nothing to rank and empty replies.

    Raises:
        UserError: With the number of the reply.
    """
    if not replies:
        raise UserError("score: give at least one reply")
    for number, reply in enumerate(replies):
        if not isinstance(reply, str) or not reply.strip():
            raise UserError(f"score: reply {number} is empty; only text has a likelihood")


def one_begin(ids: Sequence[int], begin: int | None) -> list[int]:
    """Ids without the begin tokens that follow another at the start."""
    ids = list(ids)
    while begin is not None and ids[:2] == [begin, begin]:
        del ids[0]
    return ids


def shared_length(context: Sequence[int], whole: Sequence[int]) -> int:
    """How many ids of a context open the ids of context and reply too."""
    length = 0
    for one, other in zip(context, whole, strict=False):
        if one != other:
            break
        length += 1
    return length


def text_ids(tokenizer: Any, context: str, reply: str) -> tuple[list[int], int]:
    """Ids of a plain context with a reply, and how many of them are the context's.

    An empty context is one begin token (of tokenizers that have none the end token), which is not scored.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    whole = one_begin(tokenizer(context + reply).input_ids, begin)
    known = one_begin(tokenizer(context.rstrip(" ")).input_ids, begin)
    if not context.rstrip(" "):
        if begin is None:
            raise UserError("score: this tokenizer has no begin token, so a context is needed")
        whole = whole if whole[:1] == [begin] else [begin, *whole]
        known = [begin]
    return whole, shared_length(known, whole)
