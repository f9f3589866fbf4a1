"""Drawing of the procedure world: tissue under an endoscope, and instruments whose motion shows what they do.

Places are fractions of the picture's side, (down, right). Time inside a segment of the operation runs from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Place = tuple[float, float]

SIDES: dict[str, Place] = {"left": (0.5, -0.1), "right": (0.5, 1.1), "top": (-0.1, 0.5), "bottom": (1.1, 0.5)}
METAL = {
    "grasper": (215, 215, 225),
    "bipolar": (75, 85, 205),
    "hook": (35, 35, 40),
    "scissors": (235, 200, 45),
    "clipper": (240, 120, 220),
    "irrigator": (60, 225, 215),
}
TISSUE = {
    "gallbladder": (95, 165, 80),
    "cystic duct": (215, 190, 120),
    "liver": (120, 45, 40),
    "adhesion": (245, 225, 215),
    "fluid": (150, 10, 25),
    "specimen bag": (150, 175, 240),
}
RADII: dict[str, Place] = {  # half axes down and right
    "gallbladder": (0.13, 0.18),
    "cystic duct": (0.14, 0.045),
    "liver": (0.15, 0.24),
    "adhesion": (0.05, 0.15),
    "fluid": (0.09, 0.17),
    "specimen bag": (0.14, 0.15),
}
WALL = (205, 115, 105)
PULLS = ("retract", "pack")  # verbs that move the target along


@dataclass(frozen=True)
class Action:
    """What one instrument does.

    Attributes:
        side: Edge of the picture that the instrument comes from.
    """

    instrument: str
    verb: str
    target: str
    side: str = "left"

    @property
    def triplet(self) -> tuple[str, str, str]:
        return self.instrument, self.verb, self.target


@dataclass(frozen=True)
class Field:
    """The field of view: where each kind of tissue is.

    Attributes:
        organs: Kind of tissue -> its centre.
        phase: Of the slow movement with which the patient breathes, 0 to 1.
    """

    organs: Mapping[str, Place]
    phase: float = 0.0
    texture: np.ndarray = field(default_factory=lambda: np.zeros((4, 4), np.float32), repr=False)


def lay_out(rng: np.random.Generator, targets: Sequence[str]) -> Field:
    """A field that shows these targets, and a liver and a gallbladder anyway."""
    shown = list(dict.fromkeys(["liver", "gallbladder", *targets]))
    spots = [(0.3, 0.32), (0.34, 0.68), (0.68, 0.36), (0.66, 0.67), (0.5, 0.5)]
    chosen = rng.permutation(len(spots))[: len(shown)].tolist()
    jitter = rng.uniform(-0.04, 0.04, (len(shown), 2))
    organs = {
        name: (spots[spot][0] + float(dy), spots[spot][1] + float(dx))
        for name, spot, (dy, dx) in zip(shown, chosen, jitter, strict=True)
    }
    return Field(organs, float(rng.random()), rng.normal(0, 1, (7, 7)).astype(np.float32))


def tip_of(action: Action, target: Place, time: float) -> Place:
    """Where the tip of an instrument is at a time inside its segment."""
    edge = SIDES[action.side]
    out = (edge[0] - target[0], edge[1] - target[1])
    length = math.hypot(*out)
    away = (out[0] / length, out[1] / length)
    across = (-away[1], away[0])
    along, sideways = {
        "grasp": (0.22 * (1 - time), 0.0),
        "retract": (0.20 * time, 0.0),
        "pack": (0.0, 0.20 * time),
        "dissect": (0.0, 0.09 * math.sin(4 * math.pi * time + 0.7)),
        "cut": (0.04 * math.cos(6 * math.pi * time), 0.0),
    }.get(action.verb, (0.0, 0.0))
    return (
        target[0] + along * away[0] + sideways * across[0],
        target[1] + along * away[1] + sideways * across[1],
    )


def _moved(action: Action, target: Place, time: float) -> Place:
    """Where a target is that an instrument pulls."""
    return tip_of(action, target, time) if action.verb in PULLS else target


class _Canvas:
    """A picture that is painted over, float32 [size, size, 3]."""

    def __init__(self, size: int, texture: np.ndarray, noise: np.ndarray) -> None:
        self.size = size
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.y, self.x = axis[:, None], axis[None, :]
        cells = np.linspace(0, len(texture) - 1, size).round().astype(int)
        shade = 1 + 0.06 * texture[cells][:, cells, None] + noise
        self.pixels = np.array(WALL, np.float32) * shade

    def paint(self, inside: np.ndarray, colour: Sequence[float], share: float = 1.0) -> None:
        cover = (share * np.clip(inside, 0, 1))[..., None]
        self.pixels = self.pixels * (1 - cover) + np.array(colour, np.float32) * cover

    def ellipse(self, centre: Place, radii: Place) -> np.ndarray:
        """Cover of an ellipse with an edge of about one pixel."""
        distance = np.hypot((self.y - centre[0]) / radii[0], (self.x - centre[1]) / radii[1])
        return (1 - distance) * min(radii) * self.size + 0.5

    def line(self, start: Place, end: Place, width: float) -> np.ndarray:
        """Cover of a line with round ends."""
        dy, dx = end[0] - start[0], end[1] - start[1]
        length = max(dy * dy + dx * dx, 1e-9)
        share = np.clip(((self.y - start[0]) * dy + (self.x - start[1]) * dx) / length, 0, 1)
        distance = np.hypot(self.y - start[0] - share * dy, self.x - start[1] - share * dx)
        return (width / 2 - distance) * self.size + 0.5


def frame(view: Field, actions: Sequence[Action], time: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """One frame, uint8 [size, size, 3].

    Args:
        actions: What is done in the segment.
        time: Inside the segment, 0 to 1.
        rng: Noise of the camera.
    """
    canvas = _Canvas(size, view.texture, rng.normal(0, 0.03, (size, size, 1)).astype(np.float32))
    breath = 0.012 * math.sin(2 * math.pi * (view.phase + time))
    places = {name: (y + breath, x) for name, (y, x) in view.organs.items()}
    for action in actions:
        places[action.target] = _moved(action, places[action.target], time)
    for name in sorted(places, key=list(TISSUE).index):
        _draw_tissue(canvas, name, places[name], actions, time)
    for action in actions:
        _draw_effect(canvas, action, places[action.target], time)
        _draw_instrument(canvas, action, _tip(action, view, places, breath, time))
    outside = np.hypot(canvas.y - 0.5, canvas.x - 0.5)
    canvas.paint((outside - 0.49) * size + 0.5, (0, 0, 0))
    return np.clip(canvas.pixels, 0, 255).astype(np.uint8)


def _tip(action: Action, view: Field, places: Mapping[str, Place], breath: float, time: float) -> Place:
    if action.verb in PULLS:
        return places[action.target]
    y, x = view.organs[action.target]
    return tip_of(action, (y + breath, x), time)


def _draw_tissue(canvas: _Canvas, name: str, place: Place, actions: Sequence[Action], time: float) -> None:
    scale = 1.0
    for action in actions:
        if name == "fluid" and action.verb == "aspirate":
            scale = 1.0 - 0.7 * time
    radii = RADII[name]
    canvas.paint(canvas.ellipse(place, (radii[0] * scale, radii[1] * scale)), TISSUE[name])
    if name == "specimen bag":
        canvas.paint(canvas.ellipse(place, (0.6 * radii[0], 0.6 * radii[1])), (95, 115, 185))


def _draw_effect(canvas: _Canvas, action: Action, place: Place, time: float) -> None:
    """What an action leaves behind or gives off."""
    y, x = place
    if action.verb == "clip" and time > 0.4:
        canvas.paint(canvas.line((y - 0.03, x - 0.07), (y - 0.03, x + 0.07), 0.035), (250, 250, 250))
        canvas.paint(canvas.line((y + 0.04, x - 0.07), (y + 0.04, x + 0.07), 0.035), (250, 250, 250))
    elif action.verb == "cut" and time > 0.4:
        canvas.paint(canvas.line((y, x - 0.1), (y, x + 0.1), 0.05), (60, 10, 10))
    elif action.verb == "coagulate":
        canvas.paint(canvas.ellipse((y - 0.08, x), (0.05 + 0.15 * time,) * 2), (225, 225, 225), 0.65)
    elif action.verb == "irrigate":
        canvas.paint(canvas.ellipse((y + 0.02, x), (0.04 + 0.12 * time, 0.05 + 0.2 * time)), (120, 190, 245), 0.8)


def _draw_instrument(canvas: _Canvas, action: Action, tip: Place) -> None:
    colour, edge = METAL[action.instrument], SIDES[action.side]
    out = (edge[0] - tip[0], edge[1] - tip[1])
    length = math.hypot(*out)
    away = (out[0] / length, out[1] / length)
    across = (-away[1], away[0])

    def at(along: float, sideways: float) -> Place:
        return (
            tip[0] + along * away[0] + sideways * across[0],
            tip[1] + along * away[1] + sideways * across[1],
        )

    canvas.paint(canvas.line(at(0.09, 0), edge, 0.075), colour)
    for start, end, width in _tips(action.instrument):
        canvas.paint(canvas.line(at(*start), at(*end), width), colour)


def _tips(instrument: str) -> Iterator[tuple[Place, Place, float]]:
    """Strokes of an instrument's tip: start and end as (away from the target, sideways), and width."""
    neck = (0.09, 0.0)
    if instrument == "grasper":
        yield from ((neck, (0.0, side), 0.04) for side in (-0.06, 0.06))
    elif instrument == "bipolar":
        yield from (((0.09, side), (0.0, side), 0.035) for side in (-0.04, 0.04))
        yield (0.09, -0.04), (0.09, 0.04), 0.035
    elif instrument == "hook":
        yield neck, (0.0, 0.0), 0.045
        yield (0.0, 0.0), (0.0, 0.07), 0.045
    elif instrument == "scissors":
        yield from (((0.09, side), (0.0, -side), 0.035) for side in (-0.05, 0.05))
    elif instrument == "clipper":
        yield neck, (0.02, 0.0), 0.13
    else:
        yield neck, (0.0, 0.0), 0.06


def box_of(action: Action, view: Field, time: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom around the tip of an instrument, as fractions of the picture."""
    breath = 0.012 * math.sin(2 * math.pi * (view.phase + time))
    y, x = view.organs[action.target]
    y, x = tip_of(action, (y + breath, x), time)
    return max(x - 0.1, 0.0), max(y - 0.1, 0.0), min(x + 0.1, 1.0), min(y + 0.1, 1.0)
