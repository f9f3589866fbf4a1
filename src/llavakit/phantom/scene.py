"""The scene world: coloured shapes and short words on noise, as pictures, pairs of pictures and clips.

For everything outside medicine: colours, shapes, counts, places, relations, reading, comparing two pictures, motion
and order in time. Objects are in the cells of a grid, about three by three on a square canvas; wide and tall
canvases have more columns or rows with cells of the same size, so that systems which cut a picture into tiles have
something to gain.

Answers are balanced by construction, see `phantom.base.thin`; a question about "the red disc" is asked only if there
is exactly one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from llavakit.phantom import glyphs, words
from llavakit.phantom.base import (
    Box,
    Case,
    Item,
    Question,
    World,
    check_choice,
    check_range,
    generator,
    pick,
    select_types,
    split_of,
)
from llavakit.phantom.canvas import COLOURS, SHAPES, Sign, Thing, covers, render

EASY_SHAPES, EASY_COLOURS = SHAPES[:4], tuple(COLOURS)[:6]
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SIGNS = (
    "EXIT", "STOP", "OPEN", "SHOP", "TAXI", "CAFE", "BANK", "GATE", "PARK", "ZOO", "BUS", "SALE",
    "7", "12", "24", "36", "48", "59", "A1", "B2", "C3", "D4", "E5", "F6",
)  # fmt: skip
EDITS = ("recoloured", "moved", "removed", "added")

IMAGE_TYPES = ("colour", "shape", "count", "row", "column", "exist", "relation", "text", "box")
EASY_TYPES = ("colour", "shape", "count", "row", "column", "exist")
PAIR_TYPES = ("more", "same", "edit")
VIDEO_TYPES = ("direction", "order", "moving")
TYPES = (*IMAGE_TYPES, *PAIR_TYPES, *VIDEO_TYPES)


class Scene(World):
    """Coloured shapes on noise.

    Args:
        size: Pixels of a square canvas; other canvases have about the same area.
        aspect: Width divided by height, 0.2 to 5; or "mixed": a different one for every scene.
        difficulty: "full", or "easy": one or two of four shapes in six colours, no words, no relations; learnable by
            a tiny model at 24 to 48 pixels.
        types: Question types about the picture, of `IMAGE_TYPES`; None for those of the difficulty.
        most: Largest number of objects, 1 to 6; None for 4, or 2 if easy.
        scale: Size of an object as a share of its cell, 0.1 to 0.95.
        pairs: Add an item with a second, altered picture and questions that compare the two.
        videos: Add an item with a clip and questions about motion and order.
        frames: Number of frames of a clip, at least 4.
    """

    name = "scene"
    version = 2

    def __init__(
        self,
        *,
        size: int = 48,
        aspect: float | str = 1.0,
        difficulty: str = "full",
        types: Any = None,
        most: int | None = None,
        scale: float = 0.85,
        pairs: bool = False,
        videos: bool = False,
        frames: int = 8,
    ) -> None:
        self.size = int(check_range("size", size, 24, 4096))
        self.aspect = aspect if aspect == "mixed" else check_range("aspect", aspect, 0.2, 5.0)
        self.difficulty = check_choice("difficulty", difficulty, ("full", "easy"))
        easy = difficulty == "easy"
        self.types = select_types(types, IMAGE_TYPES, EASY_TYPES if easy else IMAGE_TYPES)
        self.shapes = EASY_SHAPES if easy else SHAPES
        self.colours = EASY_COLOURS if easy else tuple(COLOURS)
        self.most = int(check_range("most", most or (2 if easy else 4), 1, 6))
        self.scale = check_range("scale", scale, 0.1, 0.95)
        self.pairs = pairs
        self.videos = videos
        self.frames = int(check_range("frames", frames, 4, 1000))

    def sample(self, seed: int, index: int) -> Case:
        """Scene number `index`; see `World.sample`."""
        rng = generator(seed, index, "scene/things")
        height, width = self._canvas(rng)
        sign = self._sign(rng, height, width)
        count = 1 + int(rng.integers(self.most))
        things = self._things(rng, height, width, count, sign)
        if len(things) < count:
            sign, things = None, self._things(rng, height, width, count, None)
        case_id = f"scene-{seed}-{index:07d}"
        noise = generator(seed, index, "scene/noise")
        image = render(things, sign, height, width, noise)
        caption = describe(things, sign)
        items = [
            Item(
                id=case_id,
                kind="image",
                media=(image,),
                questions=self._ask(generator(seed, index, "scene/questions"), things, sign, height, width),
                caption=caption,
                caption_prompt=words.CAPTION,
                boxes=[_box(thing, height, width) for thing in things],
            )
        ]
        if self.pairs:
            rng = generator(seed, index, "scene/pair")
            items.append(self._pair(rng, case_id, things, sign, height, width, image, noise))
        if self.videos:
            items.append(self._clip(generator(seed, index, "scene/clip"), case_id, height, width))
        return Case(
            id=case_id,
            split=split_of(index),
            items=items,
            facts={
                "width": width,
                "height": height,
                "things": [{"shape": t.shape, "colour": t.colour, "cell": list(t.cell)} for t in things],
                **({"text": sign.text} if sign else {}),
            },
            triples=[(thing.name, "located_at", _place(thing, height, width)) for thing in things],
        )

    # -- what is in the picture --------------------------------------------------------------------------------

    def _canvas(self, rng: np.random.Generator) -> tuple[int, int]:
        aspect = float(np.exp(rng.uniform(-1.4, 1.4))) if self.aspect == "mixed" else self.aspect
        if aspect == 1.0:
            return self.size, self.size
        return max(24, round(self.size / aspect**0.5)), max(24, round(self.size * aspect**0.5))

    def _cell(self, height: int, width: int) -> int:
        return min(height, width) // 3

    def _sign(self, rng: np.random.Generator, height: int, width: int) -> Sign | None:
        """A word in half of the pictures, if reading is asked about and there is room for it."""
        if "text" not in self.types or rng.random() < 0.5:
            return None
        text = pick(rng, SIGNS)
        scale = max(1, self._cell(height, width) // 14)
        tall, wide = glyphs.HEIGHT * scale + 4, ((glyphs.WIDTH + 1) * len(text) - 1) * scale + 4
        if wide > width:
            return None
        top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
        return Sign(text, top, left, scale)

    def _things(self, rng: np.random.Generator, height: int, width: int, count: int, sign: Sign | None) -> list[Thing]:
        """Objects in different cells, none of them under the sign; fewer than `count` only if there is no room."""
        cell = self._cell(height, width)
        rows, columns = height // cell, width // cell
        order = rng.permutation(rows * columns).tolist()
        things: list[Thing] = []
        for number in order:
            if len(things) == count:
                break
            row, column = divmod(number, columns)
            if sign is None or not covers(sign, row * height // rows, column * width // columns, cell):
                things.append(self._thing(rng, height, width, (row, column)))
        return things

    def _thing(
        self, rng: np.random.Generator, height: int, width: int, place: tuple[int, int], like: Thing | None = None
    ) -> Thing:
        """A random object (or one that looks `like` another) somewhere in a cell."""
        cell = self._cell(height, width)
        side = max(3, int(cell * self.scale * (0.8 + 0.2 * rng.random())))
        play = cell - side + 1
        top = place[0] * height // (height // cell) + int(rng.integers(play))
        left = place[1] * width // (width // cell) + int(rng.integers(play))
        shape, colour = (like.shape, like.colour) if like else (pick(rng, self.shapes), pick(rng, self.colours))
        return Thing(shape, colour, place, top, left, side)

    # -- what is asked -----------------------------------------------------------------------------------------

    def _ask(
        self, rng: np.random.Generator, things: list[Thing], sign: Sign | None, height: int, width: int
    ) -> list[Question]:
        """Questions about one picture.

        Every object is the subject of one question, or of one about its row and one about its column: "the red disc" in
        one question would answer "What colour is the disc?" in another. What such names reveal as well (how many
        objects there are, whether one exists) is asked first or, in most dialogues, not at all, so that a dialogue can
        open with any type of question.
        """
        types, rest = self.types, []
        names = [thing.name for thing in things]
        subjects = [things[i] for i in rng.permutation(len(things))]
        unique = [thing for thing in subjects if names.count(thing.name) == 1]
        if "relation" in types and len(unique) > 1 and rng.random() < 0.5:
            question = _relation(rng, unique[0], unique[1])
            if question is not None:
                rest.append(question)
                subjects = [thing for thing in subjects if thing not in unique[:2]]
        for thing in subjects:
            topics = []
            if "colour" in types and sum(o.shape == thing.shape for o in things) == 1:
                topics.append([_colour(thing, self.colours)])
            if "shape" in types and sum(o.colour == thing.colour for o in things) == 1:
                topics.append([_shape(thing, self.shapes)])
            if thing in unique:
                topics.append([q for q in _places(thing, height, width) if q.type in types])
                if "box" in types:
                    topics.append([_ground(thing, height, width)])
            if topics := [topic for topic in topics if topic]:
                rest += pick(rng, topics)
        if "text" in types and sign is not None:
            rest.append(Question("text", "What does the sign say?", sign.text, f"The sign says {sign.text}.", SIGNS))
        first = []
        if "count" in types and (not rest or rng.random() < 0.35):
            first.append(_count(len(things), self.most))
        if "exist" in types and (not rest or rng.random() < 0.35):
            first.append(self._exist(rng, names))
        return [part[i] for part in (first, rest) for i in rng.permutation(len(part))]

    def _exist(self, rng: np.random.Generator, names: list[str]) -> Question:
        """Whether there is an object of a certain colour and shape; yes and no are equally likely for each question."""
        if rng.random() < 0.5:
            name, answer = pick(rng, names), "Yes"
        else:
            answer = "No"
            name = names[0]
            while name in names:
                name = f"{pick(rng, self.colours)} {pick(rng, self.shapes)}"
        there = f"There is {words.article(name)}." if answer == "Yes" else f"There is no {name}."
        return Question("exist", f"Is there {words.article(name)} in the picture?", answer, there, ("Yes", "No"))

    # -- two pictures ------------------------------------------------------------------------------------------

    def _pair(
        self,
        rng: np.random.Generator,
        case_id: str,
        things: list[Thing],
        sign: Sign | None,
        height: int,
        width: int,
        image: np.ndarray,
        noise: np.random.Generator,
    ) -> Item:
        """The picture beside a copy in which one object was recoloured, moved, removed or added."""
        edit = pick(rng, EDITS)
        free = self._things(rng, height, width, 99, sign)
        taken = {thing.cell for thing in things}
        free = [thing for thing in free if thing.cell not in taken]
        k = int(rng.integers(len(things)))
        old = things[k]
        rest = things[:k] + things[k + 1 :]
        if edit in ("moved", "added") and not free:
            edit = "recoloured"
        if edit == "removed" and len(things) == 1:
            edit = "added" if free else "recoloured"
        if edit == "recoloured":
            others = [colour for colour in self.colours if colour != old.colour]
            later, sentence = [*rest, replace(old, colour=pick(rng, others))], f"The {old.name} has changed its colour."
        elif edit == "moved":
            later = [*rest, self._thing(rng, height, width, free[0].cell, like=old)]
            sentence = f"The {old.name} has moved."
        elif edit == "removed":
            later, sentence = rest, f"The {old.name} has been removed."
        else:
            later, sentence = [*things, free[0]], f"{words.capital(words.article(free[0].name))} has been added."
        pictures, scenes = (image, render(later, sign, height, width, noise)), (things, later)
        if rng.random() < 0.5:
            # The reversed pair: what was added is then removed.
            pictures, scenes = pictures[::-1], scenes[::-1]
            edit = {"removed": "added", "added": "removed"}.get(edit, edit)
            before, after = scenes
            gone = [t for t in before if t not in after]
            new = [t for t in after if t not in before]
            sentence = {
                "recoloured": lambda: f"The {gone[0].name} has changed its colour.",
                "moved": lambda: f"The {gone[0].name} has moved.",
                "removed": lambda: f"The {gone[0].name} has been removed.",
                "added": lambda: f"{words.capital(words.article(new[0].name))} has been added.",
            }[edit]()
        before, after = scenes
        questions = []
        # Which picture shows more gives away whether something was added or removed: one of the two is asked.
        if len(before) != len(after) and rng.random() < 0.5:
            more = "first" if len(before) > len(after) else "second"
            questions.append(
                Question(
                    "more",
                    "Which picture shows more objects?",
                    words.capital(more),
                    f"The {more} picture shows more objects.",
                    ("First", "Second"),
                )
            )
        else:
            questions.append(
                Question(
                    "edit",
                    "What happened to an object between the first and the second picture?",
                    words.capital(edit),
                    sentence,
                    tuple(map(words.capital, EDITS)),
                )
            )
        changed = {t.name for t in before} ^ {t.name for t in after}
        both = {t.name for t in before} & {t.name for t in after}
        if changed and both:
            same = rng.random() < 0.5
            name = pick(rng, sorted(both if same else changed))
            questions.append(
                Question(
                    "same",
                    f"Do both pictures show {words.article(name)}?",
                    "Yes" if same else "No",
                    f"{'Both pictures show' if same else 'Only one picture shows'} {words.article(name)}.",
                    ("Yes", "No"),
                )
            )
        return Item(
            id=f"{case_id}-pair",
            kind="images",
            media=pictures,
            questions=questions,
            caption=sentence,
            caption_prompt="Compare the second picture with the first.",
        )

    # -- clips -------------------------------------------------------------------------------------------------

    def _clip(self, rng: np.random.Generator, case_id: str, height: int, width: int) -> Item:
        """One object crosses the picture; two others appear one after the other and stay."""
        cell = self._cell(height, width)
        direction = pick(rng, tuple(DIRECTIONS))
        dy, dx = DIRECTIONS[direction]
        mover = self._thing(rng, height, width, (0, 0))
        free = [name for name in self._names() if name.split()[1] != mover.shape and name.split()[0] != mover.colour]
        first = pick(rng, free)
        second = pick(rng, [n for n in free if n.split()[0] != first.split()[0] and n.split()[1] != first.split()[1]])
        # The mover keeps to a lane (a row or column of cells), the other two to the lanes beside it.
        lanes = (height if dx else width) // cell
        lane = int(rng.integers(lanes))
        steps = (width if dx else height) // cell
        beside = [(r, s) for r in range(lanes) for s in range(steps) if r != lane]
        i, j = rng.permutation(len(beside))[:2].tolist()
        still = []
        for name, (r, s) in ((first, beside[i]), (second, beside[j])):
            colour, shape = name.split()
            like = replace(mover, shape=shape, colour=colour)
            still.append(self._thing(rng, height, width, (r, s) if dx else (s, r), like=like))
        starts = np.sort(rng.permutation(self.frames - 2)[:2] + 1).tolist()
        reach = (width if dx else height) - mover.side
        frames = np.empty((self.frames, height, width, 3), np.uint8)
        for t in range(self.frames):
            share = t / (self.frames - 1)
            along = round(reach * (share if dx + dy > 0 else 1.0 - share))
            across = lane * (height // lanes if dx else width // lanes) + (cell - mover.side) // 2
            place = {"top": across, "left": along} if dx else {"top": along, "left": across}
            shown = [thing for thing, start in zip(still, starts, strict=True) if t >= start]
            frames[t] = render([*shown, replace(mover, **place)], None, height, width, rng)
        rest = [
            Question(
                "direction",
                f"In which direction does the {mover.name} move?",
                words.capital(direction),
                f"The {mover.name} moves {direction}.",
                tuple(map(words.capital, DIRECTIONS)),
            ),
            _order(rng, first, second),
        ]
        # Either of these gives away what moves.
        opening = [_moving(rng, mover, first, second)] if rng.random() < 0.5 else []
        questions = opening + [rest[i] for i in rng.permutation(2)]
        return Item(
            id=f"{case_id}-clip",
            kind="video",
            media=(frames,),
            questions=questions,
            caption=f"{words.capital(words.article(mover.name))} moves {direction}, then {words.article(first)} "
            f"and {words.article(second)} appear.",
            caption_prompt="Describe the video.",
        )

    def _names(self) -> list[str]:
        return [f"{colour} {shape}" for colour in self.colours for shape in self.shapes]

    def texts(self) -> list[str]:
        """Every sentence form with every word in it; see `World.texts`."""
        out = words.shared_texts()
        names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        full = Scene(size=96, pairs=True, videos=True, frames=4)
        for index in range(120):
            case = full.sample(0, index)
            for item in case.items:
                out += [f"{q.text} {q.answer} {q.sentence}" for q in item.questions]
                out += [f"{item.caption_prompt} {item.caption}"]
            out += [" ".join(statement) for statement in case.triples]
        for name in names:
            colour, shape = name.split()
            out += [f"There is {words.article(name)}, no {name}. The {name} is in the {colour} {shape}."]
            out += [f"{words.capital(colour)} {shape}. {words.capital(shape)} {colour} {shape}s."]
        for word in (*ROWS, *COLUMNS, *DIRECTIONS, *EDITS, "first", "second"):
            out += [f"{words.capital(word)} The {word}."]
        return out + list(SIGNS) + [f"The sign says {sign}." for sign in SIGNS]


# ---------------------------------------------------------------------------------------------------------------
# Sentences


def describe(things: list[Thing], sign: Sign | None) -> str:
    """All objects in one sentence, in reading order, and the sign."""
    parts = [words.article(t.name) for t in sorted(things, key=lambda t: t.cell)]
    if sign is not None:
        parts.append(f"a sign that says {sign.text}")
    return f"There is {words.listing(parts)}." if parts else "There is nothing."


def format_box(xyxy: tuple[float, float, float, float]) -> str:
    """A box as LLaVA-1.5 writes it: "[x1, y1, x2, y2]", two decimals (spec llava-1.5, section 4.5)."""
    return "[" + ", ".join(f"{value:.2f}" for value in xyxy) + "]"


def _count(number: int, most: int) -> Question:
    word = words.NUMBERS[number]
    sentence = "There is one object." if number == 1 else f"There are {word.lower()} objects."
    return Question("count", "How many objects are there?", word, sentence, words.NUMBERS[1 : most + 1])


def _colour(thing: Thing, colours: tuple[str, ...]) -> Question:
    sentence = f"The {thing.shape} is {thing.colour}."
    choices = tuple(map(words.capital, colours))
    return Question("colour", f"What colour is the {thing.shape}?", words.capital(thing.colour), sentence, choices)


def _shape(thing: Thing, shapes: tuple[str, ...]) -> Question:
    sentence = f"The {thing.colour} object is {words.article(thing.shape)}."
    choices = tuple(map(words.capital, shapes))
    return Question("shape", f"What shape is the {thing.colour} object?", words.capital(thing.shape), sentence, choices)


def _places(thing: Thing, height: int, width: int) -> list[Question]:
    """Questions about row and column, left out if the object is close to a border between thirds."""
    questions = []
    for type_, names, third in (
        ("row", ROWS, _third(thing.top + thing.side / 2, height)),
        ("column", COLUMNS, _third(thing.left + thing.side / 2, width)),
    ):
        if third is not None:
            sentence = f"The {thing.name} is in the {names[third]} {type_}."
            text, choices = f"In which {type_} is the {thing.name}?", tuple(map(words.capital, names))
            questions.append(Question(type_, text, words.capital(names[third]), sentence, choices))
    return questions


def _ground(thing: Thing, height: int, width: int) -> Question:
    answer = format_box(_box(thing, height, width).xyxy)
    return Question("box", f"{words.GROUND} {words.capital(thing.name)}.", answer, answer, self_contained=True)


def _relation(rng: np.random.Generator, a: Thing, b: Thing) -> Question | None:
    """Whether one object is left of, right of, above or below another; None if they are level."""
    horizontal = rng.random() < 0.5
    difference = (a.left - b.left) if horizontal else (a.top - b.top)
    if abs(difference) < 0.6 * min(a.side, b.side):
        return None
    names = ("left of", "right of") if horizontal else ("above", "below")
    true = names[0] if difference < 0 else names[1]
    asked = pick(rng, names)
    answer = "Yes" if asked == true else "No"
    sentence = f"The {a.name} is {true} the {b.name}."
    return Question("relation", f"Is the {a.name} {asked} the {b.name}?", answer, sentence, ("Yes", "No"))


def _order(rng: np.random.Generator, first: str, second: str) -> Question:
    a, b = (first, second) if rng.random() < 0.5 else (second, first)
    return Question(
        "order",
        f"Which appears first, the {a} or the {b}?",
        words.capital(first),
        f"The {first} appears first.",
        (words.capital(a), words.capital(b)),
    )


def _moving(rng: np.random.Generator, mover: Thing, first: str, second: str) -> Question:
    moves = rng.random() < 0.5
    name = mover.name if moves else pick(rng, (first, second))
    sentence = f"The {name} moves." if moves else f"The {name} does not move."
    return Question("moving", f"Does the {name} move?", "Yes" if moves else "No", sentence, ("Yes", "No"))


# ---------------------------------------------------------------------------------------------------------------
# Places and pixels


def _third(center: float, extent: int) -> int | None:
    """Which third of the canvas; None close to a border between thirds."""
    position = 3.0 * center / extent
    return None if min(abs(position - 1.0), abs(position - 2.0)) < 0.12 else int(position)


def _place(thing: Thing, height: int, width: int) -> str:
    row = min(int(3 * (thing.top + thing.side / 2) / height), 2)
    column = min(int(3 * (thing.left + thing.side / 2) / width), 2)
    return f"{ROWS[row]} {COLUMNS[column]}"


def _box(thing: Thing, height: int, width: int) -> Box:
    right, bottom = thing.left + thing.side, thing.top + thing.side
    return Box(thing.shape, thing.name, (thing.left / width, thing.top / height, right / width, bottom / height))
