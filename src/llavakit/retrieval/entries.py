"""What a store holds and what a search finds; nothing here knows how either is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NO_NEIGHBOUR = -1  # index of a neighbour that a store too small does not have


@dataclass(frozen=True)
class Entry:
    """One vector's worth of knowledge: a passage, or a page with its passages.

    Attributes:
        page: Name of the page: its address, or the id of the record that it was made from.
        passages: Texts, in order; one for an entry that stands for a passage.
        title: Title of the page.
        image: Path or address of the picture whose vector this is, if it is a picture's.
        fields: Anything else that was in the record, for instance the patient that an entry must not be shown to.
    """

    page: str
    passages: tuple[str, ...] = ()
    title: str = ""
    image: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The passages joined by a blank."""
        return " ".join(self.passages)


@dataclass(frozen=True)
class Hit:
    """An entry that a search found.

    Attributes:
        index: Number of the entry in its store, from 0 in the order of adding.
        score: Inner product with the query; the cosine of the angle in a store whose vectors have unit length.
    """

    index: int
    score: float
    entry: Entry
