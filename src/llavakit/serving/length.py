"""Whether a prompt can fit a context, told without tokenising all of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

_PIECE = 16_384  # characters that are tokenised at a time
_SHARED = 16  # tokens by which a piece may be longer alone than inside its text; far more than happens


def prompt_characters(tokenizer: Any, positions: int | None) -> int | None:
    """The most characters that a prompt of `positions` tokens can come from: each is at most the longest token.

    None if the model's tokenizer or context is not known.
    """
    if tokenizer is None or positions is None:
        return None
    return positions * max(map(len, tokenizer.get_vocab()), default=1)


def exceeds(texts: Iterable[str], tokenizer: Any, positions: int) -> bool:
    """Whether texts take more than `positions` tokens; True is certain, and known after reading little more."""
    count = 0
    for text in texts:
        for piece in _pieces(text):
            tokens = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)
            count += max(len(tokens["input_ids"]) - _SHARED, 0)
            if count > positions:
                return True
    return False


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that end in front of a blank, where there is one."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            blank = text.rfind(" ", start + 1, end)
            end = blank if blank > start else end
        yield text[start:end]
        start = end
