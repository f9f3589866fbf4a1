"""The world of the miniature: nine cells with a colour and an arrow, and a question that takes three look-ups.

A picture of 24 x 24 pixels has 3 x 3 cells of one of four colours; a bright edge of every cell is an arrow, which leads
to a neighbour and from the border to the opposite side. The question names a cell; the answer is the colour that one
comes to by following three arrows. Answers are written alone or in stages. Spec section 11 A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llavakit.systems.llava_o1.stages import NAMES, end_of, sections

SIDE, CELL, STEPS = 3, 8, 3
COLOURS = {"red": (0.8, 0.1, 0.1), "green": (0.1, 0.7, 0.1), "blue": (0.1, 0.2, 0.9), "yellow": (0.8, 0.8, 0.1)}
ARROWS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
EDGES = {"up": np.s_[:2, :], "down": np.s_[-2:, :], "left": np.s_[:, :2], "right": np.s_[:, -2:]}
PLACES = tuple(f"cell{n}" for n in range(SIDE * SIDE))
PAD, END = "<pad>", "<end>"
TASKS = {"whole": "<ask>", "CAPTION": "<describe>", "REASONING": "<reason>"}
TAGS = tuple(mark for name in NAMES for mark in (f"<{name}>", end_of(name)))
WORDS = (PAD, END, *TASKS.values(), *PLACES, *COLOURS, *ARROWS, ".", *TAGS)
NUMBERS = {word: number for number, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Board:
    """One picture with its question.

    Attributes:
        colours, arrows: Of all cells.
        start: Number of the cell where one begins.
    """

    colours: tuple[str, ...]
    arrows: tuple[str, ...]
    start: int

    @classmethod
    def draw(cls, random: np.random.Generator) -> Board:
        """Any board."""
        count = SIDE * SIDE
        colours = tuple(list(COLOURS)[n] for n in random.integers(len(COLOURS), size=count))
        arrows = tuple(list(ARROWS)[n] for n in random.integers(len(ARROWS), size=count))
        return cls(colours, arrows, int(random.integers(count)))

    def pixels(self, random: np.random.Generator) -> np.ndarray:
        """[24, 24, 3] with noise."""
        picture = np.zeros((SIDE * CELL, SIDE * CELL, 3), np.float32)
        for place in range(SIDE * SIDE):
            row, column = divmod(place, SIDE)
            cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            cell[:] = COLOURS[self.colours[place]]
            cell[EDGES[self.arrows[place]]] = 1.0
        return picture + random.normal(0, 0.05, picture.shape).astype(np.float32)

    def path(self) -> list[int]:
        """Cells that are visited, the first one included."""
        places = [self.start]
        for _ in range(STEPS):
            (row, column), (down, across) = divmod(places[-1], SIDE), ARROWS[self.arrows[places[-1]]]
            places.append((row + down) % SIDE * SIDE + (column + across) % SIDE)
        return places

    @property
    def answer(self) -> str:
        """Colour of the last cell."""
        return self.colours[self.path()[-1]]

    def described(self, places: Sequence[int]) -> list[str]:
        """What cells are, in one sentence."""
        return [*(word for n in places for word in (PLACES[n], self.colours[n], self.arrows[n])), "."]

    def stages(self) -> dict[str, list[str]]:
        """Words of every stage."""
        found = [PLACES[self.start], "."], self.described(range(SIDE * SIDE)), [], [self.answer]
        for place in self.path():  # a step of the reasoning is a sentence
            found[2].extend(self.described([place]))
        return dict(zip(NAMES, found, strict=True))

    def right(self, stage: str, said: str) -> bool:
        """Whether a stage says what is there; a reasoning, whether it comes to the right colour."""
        words = said.split()
        if stage == "REASONING":
            return [word for word in words if word in COLOURS][-1:] == [self.answer]
        return words == self.stages()[stage]

    def begun_right(self, text: str) -> bool:
        """Whether a beginning of a reply in stages says what is there."""
        words = text.split()
        return reply(self, "staged")[: len(words)] == words

    def answered(self, text: str) -> bool:
        """Whether a reply's conclusion is right; without stages, its last word."""
        said = sections(text)["CONCLUSION"]
        words = (text if said is None else said).replace(END, "").split()
        return bool(words) and words[-1] == self.answer


def tagged(stages: dict[str, list[str]], order: Sequence[str] = NAMES) -> list[str]:
    """Stages with their tags."""
    return [word for name in order for word in (f"<{name}>", *stages[name], end_of(name))]


def reply(board: Board, arm: str) -> list[str]:
    """What a model of an arm learns to say about a board."""
    stages = board.stages()
    match arm:
        case "direct":
            words = stages["CONCLUSION"]
        case "no caption":
            words = tagged(stages, ("SUMMARY", "REASONING", "CONCLUSION"))
        case "no tags":
            words = [word for own in stages.values() for word in own]
        case "answer first":
            words = tagged(stages, ("CONCLUSION", "SUMMARY", "CAPTION", "REASONING"))
        case "CAPTION" | "REASONING":
            words = tagged(stages, (arm,))
        case _:
            words = tagged(stages)
    return [*words, END]
