"""Boxes of what a person paints on the canvas: every new patch of paint is a box.

In the tab that makes a new picture the canvas is 512 x 512. In the one that adds to a picture, only the middle square
of nine tenths of its shorter side is painted on, and brought to 512 x 512.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llavakit.editing.geometry import CANVAS, Box, centre, centre_square, extent, with_centre
from llavakit.errors import UserError

INPAINT, CREATE, COMPOSE = "inpaint", "create", "compose"  # the three tabs
SHARE = 0.9  # of the shorter side that can be painted on
LEAST = 5  # pixels; patches that are not larger are slips of the hand


@dataclass
class Canvas:
    """What has been painted so far.

    Attributes:
        boxes: Boxes in the 512 x 512 square, in the order of painting.
        masks: The paint after each of them, bool [512, 512].
        original: The picture that is added to, RGB; None until its first event.
        side: Side of the square of it that is painted on; None until the canvas is shrunk.
        collects: Whether paint becomes boxes; not on a picture that has just been generated.
    """

    boxes: list[Box] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    original: np.ndarray | None = None
    side: int | None = None
    collects: bool = True

    def paint(self, tab: str, mask: np.ndarray, picture: np.ndarray | None = None) -> bool:
        """Take the paint as it is now; whether the canvas is to be shrunk to its middle.

        Args:
            mask: [height, width] or [height, width, channels], of which the first counts; not zero is paint.
            picture: RGB of the canvas, for the tab that adds to a picture.

        Raises:
            UserError: If paint comes before the picture.
        """
        painted = np.asarray(mask)
        painted = (painted[..., 0] if painted.ndim == 3 else painted) != 0
        if tab == INPAINT and self.original is None:
            if painted.any():
                raise UserError("mask: the canvas must be shown a picture before it is painted on")
            self.original = np.asarray(picture).copy()
            return True
        painted = self._on_canvas(painted)
        if tab != INPAINT and not painted.any():
            self.clear()
        if self.collects:
            self._collect(painted)
        return False

    def shrink(self) -> int:
        """Leave only the middle square to paint on; returns its side.

        Raises:
            UserError: If there is no picture.
        """
        if self.original is None:
            raise UserError("canvas: shows no picture that could be shrunk")
        self.side = int(SHARE * min(self.original.shape[:2]))
        return self.side

    def shown(self) -> np.ndarray:
        """The picture of the canvas, its frame outside the middle square a trace darker."""
        frame = (self.original * 0.999).astype(np.uint8)
        return with_centre(frame, centre(self.original, self.side))

    def generated(self, tab: str) -> None:
        """Go on after a picture was generated: what was added to a picture is not painted on, a new picture is."""
        self.collects = tab == CREATE

    def clear(self) -> None:
        """Forget everything."""
        self.boxes, self.masks, self.original, self.side, self.collects = [], [], None, None, True

    def scale(self, tab: str) -> float:
        """Height over width of the canvas in a tab."""
        if tab != INPAINT or self.original is None:
            return 1.0
        return self.original.shape[0] / self.original.shape[1]

    def _on_canvas(self, painted: np.ndarray) -> np.ndarray:
        """Paint in the 512 x 512 square; of a canvas of an unknown size nothing is known."""
        if painted.shape == (CANVAS, CANVAS):
            return painted
        if self.original is None or self.original.shape[:2] != painted.shape:
            return np.zeros((CANVAS, CANVAS), bool)
        side = min(painted.shape) if self.side is None else self.side
        return centre_square(painted.astype(np.uint8) * 255, CANVAS, side) != 0

    def _collect(self, painted: np.ndarray) -> None:
        """A box around what differs from the paint of the last box, erased paint included."""
        before = self.masks[-1] if self.masks else np.zeros_like(painted)
        box = extent(painted != before)
        if box is not None and box[2] - box[0] > LEAST and box[3] - box[1] > LEAST:
            self.masks.append(painted.copy())
            self.boxes.append(box)


@dataclass(frozen=True)
class Tab:
    """What a tab shows.

    Attributes:
        title: For people.
        preview, caption, phrases, generate, options: Whether it has a preview of the boxes, a field for the caption,
            one for the phrases, the buttons "Clear" and "Generate", and the generator's options.
    """

    title: str
    preview: bool = True
    caption: bool = False
    phrases: bool = True
    generate: bool = True
    options: bool = True


TABS = {
    COMPOSE: Tab("Remove or change objects", preview=False, phrases=False, generate=False, options=False),
    INPAINT: Tab("Add objects"),
    CREATE: Tab("Make a new picture", caption=True),
}


@dataclass
class WorkingImage:
    """The one picture that all tabs share: written by uploads and by whatever makes a picture, by nothing else."""

    image: object = None

    @property
    def next_tab(self) -> str:
        """The tab that goes on from here: without a picture the one that makes one."""
        return CREATE if self.image is None else INPAINT

    def shown(self, tab: str | None = None) -> object:
        """What the canvas of a tab begins with; None is a blank one."""
        return None if tab == CREATE else self.image

    def entered(self, tab: str) -> object:
        """The picture after a tab was entered; the one that makes a new picture gives the old one up."""
        if tab == CREATE:
            self.image = None
        return self.image
