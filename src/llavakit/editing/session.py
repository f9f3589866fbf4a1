"""A session of editing: every event makes a version that never changes, so that all can be undone and replayed.

    session = Session(backends, chat=PictureChat(llavakit.load("runs/demo/final")))
    session.apply({"op": "upload", "image": picture})
    session.apply({"op": "segment", "stroke": [[0.4, 0.5], [0.6, 0.5]]})
    session.apply({"op": "move", "object": 1, "dx": 120, "dy": -40})
    session.apply({"op": "generate"})
    session.save("session")

Without a text an object that was moved is pasted where it was dragged, with its own pixels; with one, a generator draws
what the text says in its box, as published. An object that was dragged out of the frame is removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from llavakit.editing.chat import PictureChat
from llavakit.editing.events import checked
from llavakit.editing.geometry import CANVAS, Box
from llavakit.editing.layout import LayoutRequest, layout_request
from llavakit.editing.objects import AWAY, FIRST, Objects, Segmented
from llavakit.editing.tabs import CREATE, INPAINT
from llavakit.errors import UserError
from llavakit.tools.rle import decode_mask, encode_mask

DILATION = 0.02  # of the shorter side, on every side of the mask; the published page's 50 pixels leave a wide halo


class NotSegmented(UserError):
    """Objects are to be changed before there are any."""


class SeveralObjects(UserError):
    """Several objects are to be replaced at once."""


class NothingNamed(UserError):
    """An object is to be replaced, and no text says by what."""


class Segmenter(Protocol):
    """Finds what a person marked or named."""

    def segment(self, image: np.ndarray, **marks: Any) -> Segmented:
        """Objects numbered from 1; `marks` are those of a `segment` event."""


class Filler(Protocol):
    """Fills a hole from what surrounds it."""

    def fill(self, image: np.ndarray, hole: np.ndarray) -> np.ndarray:
        """RGB of the same size; pixels outside the hole are unchanged."""


class Generator(Protocol):
    """Draws things at given places."""

    def replace(self, image: np.ndarray, boxes: Sequence[Box], text: str, seed: int | None) -> np.ndarray:
        """RGB picture with what a text says in boxes (pixels)."""

    def layout(self, request: LayoutRequest, seed: int | None) -> np.ndarray:
        """RGB [512, 512, 3] of a layout."""


@dataclass(frozen=True)
class Backends:
    """Who does the work; what is None is not offered.

    Attributes:
        names: What they are called, for logs.
        notes: What each can and cannot, in a sentence for the people who use it.
    """

    segmenter: Segmenter | None = None
    filler: Filler | None = None
    generator: Generator | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def need(self, kind: str, event: str) -> Any:
        """The backend of a kind.

        Raises:
            UserError: If there is none.
        """
        found = getattr(self, kind)
        if found is None:
            raise UserError(f"{event}: needs a {kind}, and none is configured")
        return found


@dataclass(frozen=True)
class Version:
    """A picture of the session.

    Attributes:
        number: From 0, in the order in which they were made.
        parent: The version that it was made of.
        op: The event that made it.
        image: RGB, read-only.
        artefacts: What the event found or was told, JSON-able.
    """

    number: int
    parent: int | None
    op: str
    image: np.ndarray
    artefacts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of size and pixels."""
        return hashlib.sha256(f"{self.image.shape}".encode() + self.image.tobytes()).hexdigest()


class Session:
    """A working image, its versions, and the events that made them.

    Args:
        backends: Who does the work.
        chat: The conversation about the working image; None for a session without one.
        pastes: Whether an object that was moved is pasted with its own pixels where no text says what is to stand
            there; the published page asks for a text.
        most_pixels: Largest picture.
        most_events: Longest session.
        most_bytes: Of the pixels of all versions.

    Attributes:
        versions: Pictures, in the order in which they were made.
        current: Number of the version that is the working image; None without one.
        objects: What was found in the working image; None if nothing was looked for.
        events: What was carried out.
        answers: Questions with their answers.
    """

    def __init__(
        self,
        backends: Backends,
        chat: PictureChat | None = None,
        *,
        pastes: bool = True,
        most_pixels: int = 16 * 2**20,
        most_events: int = 10_000,
        most_bytes: int = 4 * 2**30,
    ) -> None:
        self.backends, self.chat, self.pastes = backends, chat, pastes
        self.most_pixels, self.most_events, self.most_bytes = most_pixels, most_events, most_bytes
        self.objects: Objects | None = None
        self.versions: list[Version] = []
        self.events: list[dict[str, Any]] = []
        self.answers: list[tuple[str, str]] = []
        self.current: int | None = None
        self._undone: list[int] = []

    @property
    def image(self) -> np.ndarray | None:
        """The working image."""
        return None if self.current is None else self.versions[self.current].image

    def apply(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an event; one that fails changes nothing but objects that were dragged.

        Returns:
            What came of it: `version` (its number), `objects` with box and label, `answer`.

        Raises:
            UserError: If it is malformed, or cannot be carried out now.
        """
        op, given = self._checked(event)
        place = len(self.events)
        found = getattr(self, f"_{op}")(**given)
        self.events.insert(place, {"op": op, **given})
        return found

    def talk(self, text: str) -> Iterator[str]:
        """The answer to a question as far as it has come; a question that fails or is left is taken back.

        Pictures may change meanwhile; the answer is about the one that was there when it was asked.

        Raises:
            UserError: If there is nobody to talk to, or the question cannot be answered.
        """
        op, given = self._checked({"op": "chat", "text": text})
        if self.chat is None:
            raise UserError("chat: this session has no model to talk to")
        place, answer = len(self.events), None
        for answer in self.chat.stream(text):
            yield answer
        if answer is not None:
            self.answers.append((text, answer))
        self.events.insert(place, {"op": op, **given})

    def forget(self) -> None:
        """Begin the conversation anew, with the working image."""
        if self.chat is not None:
            self.chat.messages = []
            self.chat.changed(None if self.image is None else Image.fromarray(self.image))

    @property
    def can_undo(self) -> bool:
        """Whether there is an earlier picture."""
        return self.current is not None and self.versions[self.current].parent is not None

    @property
    def can_redo(self) -> bool:
        """Whether a picture was left by undo."""
        return bool(self._undone)

    @property
    def bytes(self) -> int:
        """Size of all pictures and layers."""
        return sum(one.image.nbytes for one in self.versions) + (0 if self.objects is None else self.objects.bytes)

    def save(self, folder: str | Path) -> Path:
        """Write the session to a new folder, see `llavakit.editing.log.save`."""
        from llavakit.editing.log import save  # it replays sessions too

        return save(self, folder)

    def _checked(self, event: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if len(self.events) >= self.most_events:
            raise UserError(f"the session has {self.most_events} events already; begin a new one")
        return checked(event)

    # events

    def _upload(self, image: Any = None) -> dict[str, Any]:
        pixels = as_pixels(image)
        if pixels.shape[0] * pixels.shape[1] > self.most_pixels:
            raise UserError(f"image: has more than {self.most_pixels:,} pixels")
        return self._new("upload", pixels, {})

    def _segment(self, dilation: int | None = None, pick: int = FIRST, **marks: Any) -> dict[str, Any]:
        image = self._picture("segment")
        if not any(value is not None for value in marks.values()):
            raise UserError("segment: mark the object with stroke, box, points or mask, or name it with text")
        segmenter, filler = (self.backends.need(kind, "segment") for kind in ("segmenter", "filler"))
        if marks.get("mask") is not None:
            marks["mask"] = _mask(marks["mask"], image)
        objects = Objects(image, segmenter.segment(image, **marks).led_by(pick))
        self._cut(objects, filler, _dilation(image) if dilation is None else dilation)
        self.objects = objects
        return {"objects": self._described()}

    def _move(self, object: int = 1, dx: int = 0, dy: int = 0) -> dict[str, Any]:
        self._selected("move").move(object, (dx, dy))
        return {"objects": self._described()}

    def _dilate(self, dilation: int = 0) -> dict[str, Any]:
        self._cut(self._selected("dilate"), self.backends.need("filler", "dilate"), dilation)
        return {"objects": self._described()}

    def _generate(self, text: str = "", seed: int | None = None) -> dict[str, Any]:
        objects = self._selected("generate")
        boxes = objects.placed()
        artefacts = {"objects": self._described(), "mask": encode_mask(~objects.kept)}
        if not boxes:
            return self._new("remove", objects.filled, artefacts, keeps=True)
        if not text and self.pastes:
            return self._new("move", objects.pasted(), artefacts, keeps=True)
        generator = self.backends.need("generator", "generate")
        if len(boxes) > 1:
            raise SeveralObjects(
                "generate: one object at a time can be replaced; drag the others out, or leave text out"
            )
        if not text:
            raise NothingNamed("generate: say what is to stand in the object's place")
        picture = generator.replace(objects.filled, boxes, text, seed)
        return self._new("replace", picture, artefacts | {"text": text, "seed": seed}, keeps=True)

    def _remove(self, object: int = 1) -> dict[str, Any]:
        self._selected("remove").move(object, AWAY)
        return self._generate()

    def _insert(
        self, boxes: Sequence[Sequence[float]] = (), phrases: Sequence[str] = (), prompt: str = "", seed: Any = None
    ) -> dict[str, Any]:
        image = self._picture("insert")
        generator = self.backends.need("generator", "insert")
        text = ";".join(phrases)
        whole = np.asarray(Image.fromarray(image).resize((CANVAS, CANVAS)))
        request = layout_request(INPAINT, _canvas_boxes(boxes), text, prompt, image=whole)
        square = generator.layout(request, seed)
        made = _put_back(image, square, boxes)
        return self._new("insert", made, {"boxes": boxes, "phrases": list(phrases), "prompt": prompt, "seed": seed})

    def _create(
        self, prompt: str = "", boxes: Sequence[Sequence[float]] = (), phrases: Sequence[str] = (), seed: Any = None
    ) -> dict[str, Any]:
        request = layout_request(CREATE, _canvas_boxes(boxes), ";".join(phrases), prompt)
        made = self.backends.need("generator", "create").layout(request, seed)
        return self._new("create", made, {"boxes": boxes, "phrases": list(phrases), "prompt": prompt, "seed": seed})

    def _chat(self, text: str = "") -> dict[str, Any]:
        if self.chat is None:
            raise UserError("chat: this session has no model to talk to")
        answer = self.chat.say(text)
        if answer is not None:
            self.answers.append((text, answer))
        return {"answer": answer}

    def _undo(self) -> dict[str, Any]:
        if not self.can_undo:
            raise UserError("undo: there is no earlier picture")
        self._undone.append(self.current)
        return self._turn_to(self.versions[self.current].parent)

    def _redo(self) -> dict[str, Any]:
        if not self.can_redo:
            raise UserError("redo: nothing was undone")
        return self._turn_to(self._undone.pop())

    def _show(self, version: int = 0) -> dict[str, Any]:
        if not 0 <= version < len(self.versions):
            raise UserError(f"show: there is no version {version}; there are {len(self.versions)}, from 0")
        self._undone.clear()
        return self._turn_to(version)

    # what events share

    def _new(self, op: str, image: np.ndarray, artefacts: Mapping[str, Any], keeps: bool = False) -> dict[str, Any]:
        """Make a version the working image; `keeps` for what is made of the objects, which may be made again."""
        image = np.ascontiguousarray(image, np.uint8)
        if sum(one.image.nbytes for one in self.versions) + image.nbytes > self.most_bytes:
            raise UserError(f"the session's pictures hold {self.most_bytes:,} bytes already; begin a new one")
        image.setflags(write=False)
        self.versions.append(Version(len(self.versions), self.current, op, image, dict(artefacts)))
        self._undone.clear()
        return self._turn_to(len(self.versions) - 1, keeps)

    def _turn_to(self, number: int, keeps: bool = False) -> dict[str, Any]:
        self.current, self.objects = number, self.objects if keeps else None
        if self.chat is not None:
            self.chat.changed(Image.fromarray(self.versions[number].image))
        return {"version": number}

    def _picture(self, op: str) -> np.ndarray:
        if self.image is None:
            raise UserError(f"{op}: there is no picture yet; upload one")
        return self.image

    def _selected(self, op: str) -> Objects:
        if self.objects is None:
            raise NotSegmented(f"{op}: no object is selected; segment the picture first")
        return self.objects

    def _cut(self, objects: Objects, filler: Filler, dilation: int) -> None:
        objects.cut(dilation)
        objects.filled = filler.fill(objects.whole[..., :3], ~objects.kept)

    def _described(self) -> list[dict[str, Any]]:
        return [{"id": one.id, "label": one.label, "box": one.box and list(one.box)} for one in self.objects.changed]


def as_pixels(image: Any) -> np.ndarray:
    """RGB uint8 [height, width, 3]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise UserError("image: must be a picture, or uint8 [height, width, 3]")
    return pixels


def _mask(value: Any, image: np.ndarray) -> np.ndarray:
    mask = decode_mask(value) if isinstance(value, Mapping) else np.asarray(value) != 0
    if mask.shape != image.shape[:2]:
        said = f"{mask.shape[-1]} x {mask.shape[0]} pixels" if mask.ndim == 2 else "no matrix"
        raise UserError(f"mask: has {said}, the picture {image.shape[1]} x {image.shape[0]}")
    return mask


def _dilation(image: np.ndarray) -> int:
    return 2 * max(1, round(DILATION * min(image.shape[:2]))) + 1


def _canvas_boxes(boxes: Sequence[Sequence[float]]) -> list[list[float]]:
    """Boxes in fractions of the picture as pixels of the generator's square."""
    for number, box in enumerate(boxes):
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise UserError(f"boxes.{number}: must be [x0, y0, x1, y1] in fractions of the picture, not {list(box)}")
    return [[value * CANVAS for value in box] for box in boxes]


def _put_back(image: np.ndarray, square: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """The picture with what was generated in its boxes; all else is unchanged."""
    height, width = image.shape[:2]
    made = np.asarray(Image.fromarray(square).resize((width, height)))
    changed = image.copy()
    for x0, y0, x1, y1 in boxes:
        rows, columns = slice(int(y0 * height), round(y1 * height)), slice(int(x0 * width), round(x1 * width))
        changed[rows, columns] = made[rows, columns]
    return changed
