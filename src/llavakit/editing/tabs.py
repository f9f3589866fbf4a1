"""What a person can do with a picture: the three tabs of the page."""

from __future__ import annotations

from dataclasses import dataclass

INPAINT, CREATE, COMPOSE = "inpaint", "create", "compose"


@dataclass(frozen=True)
class Tab:
    """What a tab shows.

    Attributes:
        title: For people.
        draws: Whether boxes are drawn, and a generator asked for what they are to hold.
        caption: Whether there is a field for what the whole picture shows.
    """

    title: str
    draws: bool = True
    caption: bool = False


TABS = {
    COMPOSE: Tab("Remove or change objects", draws=False),
    INPAINT: Tab("Add objects"),
    CREATE: Tab("Make a new picture", caption=True),
}
