"""Base of the phantom worlds: cases, items, questions, and the split of cases.

A world is a function from (seed, index) to a `Case`: one patient, or one scene. It depends on nothing else, so any
process can make any case again, in any order. A case has one or more items (a radiograph, a volume, a pair of studies,
a clip); all items of a case are in the same split, so a held-out patient is never seen in training.

This module knows neither anatomy nor shapes, draws nothing and writes no file.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llavakit.errors import UserError

HELDOUT_EVERY = 10
"""Every tenth case (index 9, 19, 29, ...) is held out."""


def split_of(index: int) -> str:
    """ "heldout" for every tenth index, "train" for the others: the split does not change when a world grows."""
    return "heldout" if index % HELDOUT_EVERY == HELDOUT_EVERY - 1 else "train"


def indices(split: str, count: int) -> Iterator[int]:
    """The first `count` case indices of a split ("train" or "heldout").

    Raises:
        UserError: If there is no such split.
    """
    if split not in ("train", "heldout"):
        raise UserError(f"split: {split!r} is unknown; use 'train' or 'heldout'")
    index = 0
    while count > 0:
        if split_of(index) == split:
            yield index
            count -= 1
        index += 1


def generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """An independent stream of random numbers for one purpose within one case.

    Separate streams keep a patient the same when only the resolution, the noise or the set of questions changes.

    Raises:
        UserError: If seed or index is negative.
    """
    if seed < 0 or index < 0:
        raise UserError(f"seed and index must not be negative, got seed={seed}, index={index}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((zlib.crc32(purpose.encode()), seed, index))))


@dataclass(frozen=True, slots=True)
class Question:
    """A question with one right answer.

    Attributes:
        type: Kind of question, the unit of balancing and of reporting ("side", "count").
        text: The question, without media placeholder and without response-format sentence.
        answer: The answer as a single word or phrase.
        sentence: The same answer as a full sentence.
        choices: All answers that this kind of question can have, for multiple choice; empty if open.
        self_contained: Whether `text` already says which form the answer has, so that no format sentence follows.
    """

    type: str
    text: str
    answer: str
    sentence: str
    choices: tuple[str, ...] = ()
    self_contained: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    """A labelled region of an image.

    Attributes:
        label: What it is ("nodule", "disc").
        description: A phrase that names it uniquely where possible ("red disc").
        xyxy: Left, top, right, bottom as fractions of the width and height of the image.
    """

    label: str
    description: str
    xyxy: tuple[float, float, float, float]


@dataclass(slots=True)
class Item:
    """One item to look at, with all that is true of it.

    Attributes:
        id: Unique within a world and seed.
        kind: "image" (one array), "images" (several, in the order of the questions), "video" or "volume" (one array).
        media: Images uint8 `[height, width]` or `[height, width, 3]`; video uint8 `[frames, height, width, 3]`;
            volume int16 `[slices, rows, columns]` in Hounsfield units.
        spacing: Volume only: size of a voxel in mm along each axis.
        caption: A description in full sentences.
        caption_prompt: The request that the caption answers.
        boxes: Objects in the (first) image.
        masks: Label to bool `[height, width]`, if the world was asked for masks.
    """

    id: str
    kind: str
    media: tuple[np.ndarray, ...]
    questions: list[Question]
    caption: str = ""
    caption_prompt: str = ""
    boxes: list[Box] = field(default_factory=list)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    spacing: tuple[float, float, float] | None = None


@dataclass(slots=True)
class Case:
    """One patient or scene.

    Attributes:
        id: Unique within a world and seed.
        split: "train" or "heldout", see `split_of`.
        items: The items to look at; the first is the world's main item.
        facts: The ground truth as JSON-able data.
        report: Named sections of a written report ("findings", "impression"); empty for worlds without.
        triples: (subject, relation, object) statements that hold for this case.
    """

    id: str
    split: str
    items: list[Item]
    facts: dict[str, Any] = field(default_factory=dict)
    report: dict[str, str] = field(default_factory=dict)
    triples: list[tuple[str, str, str]] = field(default_factory=list)


class World(ABC):
    """A procedural world. Subclasses take their options as keyword-only arguments with plain JSON-able values.

    Attributes:
        name: The name in the registry.
        version: Raised whenever the same seed gives other data than before.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def sample(self, seed: int, index: int) -> Case:
        """Case number `index` of the world with this seed; depends on nothing else.

        Raises:
            UserError: If seed or index is negative.
        """

    @abstractmethod
    def texts(self) -> list[str]:
        """Sentences that together contain every word of this world, to train a tokenizer on."""

    def knowledge(self) -> list[tuple[str, str, str]]:
        """Statements that hold for every case of this world."""
        return []


def cell_labels(boxes: Sequence[Box], rows: int, columns: int, names: Sequence[str]) -> np.ndarray:
    """Which objects are visible in each cell of a picture: dense labels to train a small encoder from scratch.

    A few hundred steps of classifying patches replace the pre-training that a published encoder has had before LLaVA's
    stage 1 begins.

    Args:
        boxes: Objects in the picture.
        rows, columns: Cells, usually the patches of the encoder.
        names: Words to look for in label and description of each box.

    Returns:
        Float32 `[rows, columns, names]`: 1 where a box of that name covers a third of the cell, or a third of the box
        is in the cell.
    """
    labels = np.zeros((rows, columns, len(names)), np.float32)
    y, x = np.arange(rows)[:, None] / rows, np.arange(columns)[None, :] / columns
    for box in boxes:
        called = {box.label, *box.description.split()}
        left, top, right, bottom = box.xyxy
        wide = np.clip(np.minimum(right, x + 1 / columns) - np.maximum(left, x), 0.0, None)
        tall = np.clip(np.minimum(bottom, y + 1 / rows) - np.maximum(top, y), 0.0, None)
        smaller = min((right - left) * (bottom - top), 1 / (rows * columns))
        covered = wide * tall >= smaller / 3
        for k, name in enumerate(names):
            if name in called:
                labels[:, :, k][covered] = 1.0
    return labels


def thin(rng: np.random.Generator, present: bool, prevalence: float) -> bool:
    """Whether to ask about the presence of something, such that yes and no come out equally often.

    Something that is present in a share p <= 1/2 of the cases is always asked about where it is present, and with
    probability p / (1 - p) where it is absent.
    """
    return present or rng.random() < prevalence / (1.0 - prevalence)


def pick(rng: np.random.Generator, options: Any) -> Any:
    """One entry of a sequence, all equally likely (much faster than `Generator.choice`)."""
    return options[int(rng.integers(len(options)))]


def check_choice(field_name: str, value: Any, known: tuple[Any, ...]) -> Any:
    """`value` if it is one of `known`.

    Raises:
        UserError: Otherwise, naming the field and what would be right.
    """
    if value not in known:
        raise UserError(f"{field_name}: {value!r} is unknown; use one of {', '.join(map(repr, known))}")
    return value


def check_range(field_name: str, value: float, low: float, high: float) -> float:
    """`value` if it is in [low, high].

    Raises:
        UserError: Otherwise, naming the field and the range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{field_name}: {value!r} is no number from {low} to {high}")
    return value


def select_types(types: Any, known: Mapping[str, str] | tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    """The question types to ask: `types` (a sequence or a comma-separated string) or the default.

    Raises:
        UserError: If one is unknown.
    """
    if types is None:
        return default
    names = tuple(types.split(",")) if isinstance(types, str) else tuple(types)
    for name in names:
        check_choice("types", name, tuple(known))
    return names
