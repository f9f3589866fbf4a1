"""Objects that were cut out of a picture: what they leave behind, where they were dragged, and the hole that is filled.

The published page hands out a picture whose alpha channel is the number of the object at a pixel. Layers here are the
same: [height, width, 4] with the number in the last channel, 0 for the background.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from llavakit.editing.geometry import Box, extent
from llavakit.errors import UserError

AWAY = (10_000, 10_000)  # a drag out of the frame
FIRST = 1  # the object that is selected as soon as there are objects


class NoSuchObject(UserError):
    """An object that was not found in the picture."""


@dataclass(frozen=True)
class Segmented:
    """What a segmenter found.

    Attributes:
        ids: uint8 [height, width], the number of the object at every pixel; 0 for none.
        labels: What each object is, by its number.
        picture: RGB of the same size, if the segmenter shows another picture than it was given (the published one
            tints objects); what is filled and moved is then cut out of that. None for the picture itself.
    """

    ids: np.ndarray
    labels: Mapping[int, str]
    picture: np.ndarray | None = None

    def led_by(self, number: int) -> Segmented:
        """The same with this object as the first one.

        Raises:
            NoSuchObject: If it was not found.
        """
        if number == FIRST:
            return self
        if number not in self.labels:
            raise NoSuchObject(f"pick: there is no object {number}; {len(self.labels)} were found")
        swapped = np.arange(256, dtype=np.uint8)
        swapped[[FIRST, number]] = number, FIRST
        labels = {int(swapped[old]): label for old, label in self.labels.items()}
        return Segmented(swapped[np.asarray(self.ids, np.uint8)], dict(sorted(labels.items())), self.picture)


@dataclass
class Layer:
    """An object on its own.

    Attributes:
        id: Its number.
        pixels: Layer [height, width, 4]; pixels that left the frame are gone.
        label: What it is.
        box: Around it; None if it is out of the frame.
    """

    id: int
    pixels: np.ndarray
    label: str
    box: Box | None


@dataclass
class Objects:
    """The objects of one segmentation.

    Args:
        picture: RGB uint8 [height, width, 3].
        found: What the segmenter found; of another size, it is brought to the picture's (nearest pixel).

    Attributes:
        whole: The layer of everything, as it was segmented.
        rest: The layer that moved objects leave behind.
        boxes: Boxes of all objects as they were found.
        changed: Objects that were selected or moved, the one that moved last at the end.
        moves: Drags so far, the selection of the first object included.
        mask: True in changed objects, where they were found.
        kept: False in the hole: `mask`, dilated.
        dilation: By how much, see `cut`.
        filled: RGB background with the hole filled; None until it is.
    """

    picture: np.ndarray
    found: Segmented
    whole: np.ndarray = field(init=False)
    rest: np.ndarray = field(init=False)
    boxes: dict[int, Box | None] = field(init=False)
    changed: list[Layer] = field(default_factory=list, init=False)
    moves: int = field(default=0, init=False)
    mask: np.ndarray | None = field(default=None, init=False)
    kept: np.ndarray | None = field(default=None, init=False)
    dilation: int = field(default=0, init=False)
    filled: np.ndarray | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        shown = self.picture if self.found.picture is None else self.found.picture
        ids = np.asarray(self.found.ids, np.uint8)
        if shown.shape[:2] != ids.shape:
            raise UserError(f"segmentation: {ids.shape} pixels for a picture of {shown.shape[:2]}")
        whole = np.dstack([shown, ids])
        height, width = self.picture.shape[:2]
        if ids.shape != (height, width):
            whole = np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.NEAREST))
        self.whole, self.rest = whole.copy(), whole.copy()
        self.boxes = {number: extent(whole[..., 3] == number) for number in self.found.labels}
        self.move(FIRST, (0, 0))
        self.mask = np.isin(self.whole[..., 3], [layer.id for layer in self.changed])

    def move(self, number: int, by: tuple[int, int]) -> Layer:
        """Drag an object by (right, down) pixels from where it is; pixels outside the frame are lost.

        Raises:
            NoSuchObject: If it was not found in the picture.
        """
        self.moves += 1
        source = next((layer for layer in self.changed if layer.id == number), None)
        if source is not None:
            self.changed.remove(source)
        pixels = self.rest if source is None else source.pixels
        rows, columns = np.nonzero(pixels[..., 3] == number)
        moved = np.zeros_like(pixels)
        down, right = rows + by[1], columns + by[0]
        inside = (down >= 0) & (down < moved.shape[0]) & (right >= 0) & (right < moved.shape[1])
        moved[down[inside], right[inside]] = pixels[rows[inside], columns[inside]]
        pixels[rows, columns] = 0
        if number not in self.found.labels:
            raise NoSuchObject(
                f"object: there is no {number}; found: {', '.join(map(str, self.found.labels)) or 'none'}"
            )
        layer = Layer(number, moved, self.found.labels[number], extent(moved))
        self.changed.append(layer)
        return layer

    def cut(self, dilation: int) -> None:
        """Open the hole.

        Args:
            dilation: Side of the elliptic kernel by which the mask is grown; 0 leaves it as it is.

        Raises:
            UserError: If it is negative.
        """
        import cv2

        if dilation < 0:
            raise UserError(f"dilation: must be at least 0, is {dilation}")
        hole = self.mask.astype(np.uint8)
        if dilation:
            hole = cv2.dilate(hole, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (dilation, dilation)))
        self.kept, self.dilation = hole == 0, dilation

    @property
    def bytes(self) -> int:
        """Size of all layers and masks."""
        layers = [self.whole, self.rest, *(layer.pixels for layer in self.changed), self.mask, self.kept, self.filled]
        return sum(layer.nbytes for layer in layers if layer is not None)

    @property
    def masked(self) -> np.ndarray:
        """The picture with the hole in black, RGB."""
        return self.whole[..., :3] * self.kept[..., None]

    def placed(self) -> list[Box]:
        """Boxes of the changed objects that are in the frame."""
        return [layer.box for layer in self.changed if layer.box is not None]

    def pasted(self) -> np.ndarray:
        """The filled background with the changed objects' own pixels where they were dragged."""
        picture = self.filled.copy()
        for layer in self.changed:
            inside = layer.pixels[..., 3] == layer.id
            picture[inside] = layer.pixels[inside][:, :3]
        return picture
