"""What the published page does between the browser and its tools, where `llavakit.editing` does something else.

There boxes are what a person paints: every new patch of paint is one. In the tab that makes a new picture the canvas is
512 x 512. In the one that adds to a picture, only the middle square of nine tenths of its shorter side is painted on,
and brought to 512 x 512. Here boxes are drawn on the whole picture, a session's current version is the working image,
and padding and weights are the affair of the models that fill and draw. The golden cases fix these steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llavakit.editing.geometry import CANVAS, LATENT, Box, centre, centre_square, extent, with_centre
from llavakit.editing.layout import SHARE
from llavakit.editing.tabs import CREATE, INPAINT
from llavakit.errors import UserError

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


def mirrored(array: np.ndarray, multiple: int = 8) -> np.ndarray:
    """[channels, height, width] extended to multiples at the right and the bottom, mirrored with the edge repeated."""
    _, height, width = array.shape
    return np.pad(array, ((0, 0), (0, -height % multiple), (0, -width % multiple)), mode="symmetric")


def kept_latents(boxes: Sequence[Sequence[float]], size: Sequence[int] = (LATENT, LATENT)) -> np.ndarray:
    """1 where latents [rows, columns] are kept, 0 in boxes (fractions) where something new comes; edges are cut off.

    As published, x goes with the number of rows and y with that of columns; that matters where these differ.
    """
    rows, columns = size
    kept = np.ones((rows, columns), np.float32)
    for x0, y0, x1, y1 in boxes:
        kept[int(y0 * columns) : int(y1 * columns), int(x0 * rows) : int(x1 * rows)] = 0
    return kept


def grounding_weights(steps: int, shares: Sequence[float]) -> list[float]:
    """Weight of the generator's grounding layers in every step.

    Args:
        shares: Shares of the steps with weight 1, of those in which it falls, and of those with 0.
    """
    full, falling = int(shares[0] * steps), int(shares[1] * steps)
    weights = [1.0] * full + np.arange(0, 1, 1 / falling)[::-1].tolist() if falling else [1.0] * full
    return weights + [0.0] * (steps - len(weights))
