"""Passages: pages cut at sentence ends into pieces of at most so many tokens."""

from __future__ import annotations

from collections.abc import Iterable

TOKENS = 300  # of a passage, as published (ReflectiVA)


def pack(sentences: Iterable[tuple[str, int]], tokens: int = TOKENS) -> list[str]:
    """Sentences put together greedily, joined by a blank.

    As published (`uniform_passages_of_sentences` of ReflectiVA), a sentence that is longer than a passage stands alone;
    it does not count where nothing stands in front of it.

    Args:
        sentences: Sentences with their numbers of tokens, in order.
        tokens: Most tokens of a passage.
    """
    passages: list[str] = []
    current: list[str] = []
    count = 0
    for sentence, length in sentences:
        if count + length <= tokens:
            current.append(sentence)
            count += length
        elif current:
            passages.append(" ".join(current))
            current, count = [sentence], length
        else:
            passages.append(sentence)
    return [*passages, " ".join(current)] if current else passages
