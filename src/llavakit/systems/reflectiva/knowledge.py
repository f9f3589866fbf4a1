"""Pages that look like the picture, and the passages in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from llavakit.retrieval.entries import Hit
    from llavakit.retrieval.retriever import Retriever

SEARCHED = 100  # neighbours that the original asks for, whatever number of pages it reads
SHORTEST = 5  # characters of a passage that is read


class Passage(NamedTuple):
    """A passage that was found.

    Attributes:
        page: Name of its page.
        title: Title of its page.
        text: As it stands there, blanks at its ends included.
        score: Of its page in the search.
    """

    page: str
    title: str
    text: str
    score: float


def unit_rows(features: Tensor) -> np.ndarray:
    """Features [queries, dimension] divided by their length in the precision in which they were computed, as float32.

    The original encodes pictures in 16 bit and normalises there, which moves neighbours that are nearly equal.
    """
    return (features / features.norm(dim=-1, keepdim=True)).float().numpy()


class Knowledge:
    """Finds pages and cuts them into passages.

    Args:
        retriever: Finds the pages.
        shortest: Characters of a passage, blanks at its ends aside; shorter ones are left out.
        searched: Most pages of a query.
    """

    def __init__(self, retriever: Retriever, *, shortest: int = SHORTEST, searched: int = SEARCHED) -> None:
        self.retriever, self.shortest, self.searched = retriever, shortest, searched

    def pages(self, query: Any, count: int) -> list[Hit]:
        """The best pages for a picture, a text or features [1, dimension]; fewer if there are no more.

        One page may come several times: a store of pictures holds it once for each.
        """
        if isinstance(query, Tensor):
            query = unit_rows(query.reshape(1, -1))[0]
        return self.retriever.retrieve([query], min(count, self.searched))[0] if count else []

    def passages(self, pages: Sequence[Hit]) -> list[Passage]:
        """The passages of pages in order."""
        return [
            Passage(hit.entry.page, hit.entry.title, text, hit.score)
            for hit in pages
            for text in hit.entry.passages
            if len(text.strip()) >= self.shortest
        ]


__all__ = ["SEARCHED", "SHORTEST", "Knowledge", "Passage", "unit_rows"]
