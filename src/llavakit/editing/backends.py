"""Who does the work of a session: skills of `llavakit.tools`, classical ones unless the user configures models.

| skill | classical | by configuration |
|---|---|---|
| segment by a mark | GrabCut | SAM, from a box or points |
| segment by a text | coloured shapes of drawn scenes | Grounding DINO or OWLv2, then SAM or GrabCut |
| fill a hole | OpenCV's inpainting | Stable Diffusion's inpainting |
| replace, insert, create | flat shapes of the phrases (a sketch) | GLIGEN |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from llavakit.editing.geometry import CANVAS, Box, extent
from llavakit.editing.layout import LayoutRequest
from llavakit.editing.objects import Segmented
from llavakit.editing.session import Backends
from llavakit.errors import UserError
from llavakit.phantom.canvas import COLOURS, SHAPES, stencil
from llavakit.tools.configuration import build_skill
from llavakit.tools.skill import Skill
from llavakit.tools.toolbox import Toolbox

DETECTORS = ("grounding_dino", "owlv2", "detect_shapes")
NOTES = {
    "segment": "GrabCut follows colours, not objects: it cuts out what differs in colour from its surroundings.",
    "sam": "SAM cuts out the object in a box or at a point.",
    "detect_shapes": "By name it finds the coloured shapes of drawn scenes (a red disc), nothing in photographs.",
    "grounding_dino": "Grounding DINO finds what a text names.",
    "owlv2": "OWLv2 finds what a text names.",
    "inpaint": "OpenCV continues the surroundings into the hole: good behind small things on plain ground, blurred "
    "behind large ones; it invents nothing.",
    "stable_inpainting": "Stable Diffusion paints what may have been behind; it may invent things.",
    "sketch": "A sketch, no generator: flat shapes of known names (a red disc), for anything else a box with its name. "
    "It does not read the description.",
    "gligen": "GLIGEN draws what the texts say at the places of the boxes.",
}


class SkillSegmenter:
    """Objects by marks and by text.

    Args:
        cutter: A skill with `stroke`, `box`, `points` and `scribble` (`segment`), or with `boxes` and `points` (`sam`).
        detector: A skill that finds boxes for a `caption`; None if objects cannot be named.
        boxes: A skill with `boxes` and `points` that takes these over (`sam`).
    """

    def __init__(self, cutter: Skill, detector: Skill | None = None, boxes: Skill | None = None) -> None:
        self.cutter, self.detector, self.boxes = cutter, detector, boxes or cutter

    @property
    def marks(self) -> tuple[str, ...]:
        """What an object can be marked with."""
        known = ("stroke", "box", "points", "mask") if "scribble" in self.cutter.properties else ("box", "points")
        return (*known, "text") if self.detector is not None else known

    def segment(self, image: np.ndarray, **marks: Any) -> Segmented:
        """One object for marks, one or more for a text, numbered from 1.

        Raises:
            UserError: If a mark is not offered, or nothing was found.
        """
        given = {name: value for name, value in marks.items() if value is not None}
        for name in given:
            if name not in (*self.marks, "point_labels"):
                raise UserError(f"segment: {name} is not offered; {', '.join(self.marks)} are")
        picture = Image.fromarray(image)
        if "text" in given:
            return self._named(picture, given["text"])
        masks = self._cut(picture, given)
        if not masks or not masks[0].any():
            raise UserError("segment: nothing was found there; mark more of the object")
        return Segmented(masks[0].astype(np.uint8), {1: "object"})

    def _cut(self, picture: Image.Image, given: Mapping[str, Any]) -> Sequence[np.ndarray]:
        cutter = self.boxes if given.keys() <= {"box", "points", "point_labels"} else self.cutter
        if "scribble" in cutter.properties:
            marks = {"scribble" if name == "mask" else name: value for name, value in given.items()}
        else:
            marks = {"boxes" if name == "box" else name: [v] if name == "box" else v for name, v in given.items()}
        return cutter(image=picture, **marks).masks

    def _named(self, picture: Image.Image, text: str) -> Segmented:
        found = self.detector(image=picture, caption=text)
        masks = found.masks
        if not masks:
            boxes = found.data.get("boxes", ())
            masks = [mask for box in boxes for mask in self._cut(picture, {"box": box})[:1]]
        if not masks:
            raise UserError(f"segment: {text!r} was not found in the picture")
        phrases = found.data.get("phrases", [text] * len(masks))
        ids = np.zeros((picture.height, picture.width), np.uint8)
        labels = {}
        for number, (mask, label) in enumerate(zip(masks[:254], phrases, strict=False), 1):
            ids[mask & (ids == 0)] = number
            labels[number] = label
        return Segmented(ids, labels)


class SkillFiller:
    """Holes filled by a skill that takes a mask: `inpaint`, or `stable_inpainting` with a prompt.

    Args:
        skill: The skill.
        prompt: What it is told, if it takes a prompt.
    """

    def __init__(self, skill: Skill, prompt: str = "background") -> None:
        self.skill, self.prompt = skill, prompt

    def fill(self, image: np.ndarray, hole: np.ndarray) -> np.ndarray:
        """RGB of the same size; pixels outside the hole are the picture's own."""
        if not hole.any():
            return image.copy()
        extra: dict[str, Any] = {"dilation": 0} if "dilation" in self.skill.properties else {}
        extra |= {"prompt": self.prompt} if "prompt" in self.skill.properties else {}
        extra |= {"seed": 0} if "seed" in self.skill.properties else {}  # so that a session can be replayed
        made = self.skill(image=Image.fromarray(image), mask=hole, **extra).pictures["edited_image"]
        return np.where(hole[..., None], np.asarray(made.convert("RGB")), image)


class SkillGenerator:
    """Things drawn by GLIGEN (`gligen`)."""

    def __init__(self, skill: Skill) -> None:
        self.skill = skill

    def replace(self, image: np.ndarray, boxes: Sequence[Box], text: str, seed: int | None) -> np.ndarray:
        """RGB picture with what a text says in boxes; outside of them nothing changes."""
        height, width = image.shape[:2]
        fractions = [[box[0] / width, box[1] / height, (box[2] + 1) / width, (box[3] + 1) / height] for box in boxes]
        made = self._made(text, [text] * len(boxes), fractions, image, seed)
        made = np.asarray(Image.fromarray(made).resize((width, height)))
        changed = image.copy()
        for x0, y0, x1, y1 in boxes:
            changed[y0 : y1 + 1, x0 : x1 + 1] = made[y0 : y1 + 1, x0 : x1 + 1]
        return changed

    def layout(self, request: LayoutRequest, seed: int | None) -> np.ndarray:
        """RGB [512, 512, 3]."""
        phrases, boxes = list(request.phrases), [list(box) for box in request.phrases.values()]
        made = self._made(request.caption, phrases, boxes, request.image, seed)
        return np.asarray(Image.fromarray(made).resize((CANVAS, CANVAS)))

    def _made(self, prompt: str, phrases: list[str], boxes: list[Any], image: Any, seed: int | None) -> np.ndarray:
        shown = {} if image is None else {"background": Image.fromarray(image).resize((CANVAS, CANVAS))}
        given = {} if seed is None else {"seed": seed}
        found = self.skill(prompt=prompt, phrases=phrases, boxes=boxes, **shown, **given)
        return np.asarray(found.pictures["edited_image"].convert("RGB"))


class Sketch:
    """Flat shapes of the phrases: "a red disc" is one; what is no known shape is a box with its name."""

    def replace(self, image: np.ndarray, boxes: Sequence[Box], text: str, seed: int | None) -> np.ndarray:
        """RGB picture with a shape in every box."""
        picture = Image.fromarray(image)
        for box in boxes:
            _draw(picture, box, text)
        return np.asarray(picture)

    def layout(self, request: LayoutRequest, seed: int | None) -> np.ndarray:
        """RGB [512, 512, 3]: the picture, or a grey canvas, with a shape in every box."""
        grey = np.full((CANVAS, CANVAS, 3), 128, np.uint8)
        picture = Image.fromarray(grey if request.image is None else request.image)
        for phrase, box in request.phrases.items():
            x0, y0, x1, y1 = (round(edge * CANVAS) for edge in box)
            _draw(picture, (x0, y0, x1 - 1, y1 - 1), phrase)
        return np.asarray(picture)


def _draw(picture: Image.Image, box: Box, phrase: str) -> None:
    words = re.findall(r"[a-z]+", phrase.lower())
    colour = next((COLOURS[word] for word in words if word in COLOURS), COLOURS["white"])
    paint = tuple(int(value) for value in colour)
    shape = next((word for word in words if word in SHAPES), None)
    left, top, right, bottom = box
    size = right - left + 1, bottom - top + 1
    if min(size) < 1:
        return
    if shape is None:
        draw = ImageDraw.Draw(picture)
        draw.rectangle(box, outline=paint, width=2)
        draw.text((left + 4, top + 3), phrase, fill=paint)
        return
    tight = _tight(shape)
    mask = Image.fromarray(tight).resize(size, Image.Resampling.BILINEAR)
    picture.paste(paint, (left, top), mask)


def _tight(shape: str) -> np.ndarray:
    """uint8 coverage of a shape, cut to its extent."""
    coverage = (np.asarray(stencil(shape, 256))[..., 0] * 255).astype(np.uint8)
    x0, y0, x1, y1 = extent(coverage > 127)
    return coverage[y0 : y1 + 1, x0 : x1 + 1]


def backends_of(toolbox: Toolbox | None = None) -> Backends:
    """The best backends that a toolbox has: the user's models where they are configured, classical ones otherwise.

    Args:
        toolbox: Configured skills, see `llavakit.tools.configuration`; None for those without weights.

    Raises:
        UserError: If neither OpenCV nor a configured model can segment or fill.
    """
    known = {} if toolbox is None else {skill.name: skill for skill in toolbox.ready}
    for name in ("segment", "inpaint", "detect_shapes"):
        skill = build_skill(name)
        if name not in known and skill.missing is None:
            known[name] = skill
    cutter = next((known[name] for name in ("segment", "sam") if name in known), None)
    filler = next((known[name] for name in ("stable_inpainting", "inpaint") if name in known), None)
    if cutter is None or filler is None:
        raise UserError("editing pictures needs opencv-python: pip install 'llavakit[tools]'")
    detector = next((known[name] for name in DETECTORS if name in known), None)
    generator = SkillGenerator(known["gligen"]) if "gligen" in known else Sketch()
    marked = f"{cutter.name}, sam for boxes and points" if "sam" in known else cutter.name
    names = {
        "segmenter": f"{marked}, {detector.name} for texts" if detector else marked,
        "filler": filler.name,
        "generator": "gligen" if "gligen" in known else "sketch (flat shapes)",
    }
    at_work = {
        "segmenter": [one.name for one in (cutter, known.get("sam"), detector) if one is not None],
        "filler": [filler.name],
    }
    notes = {kind: " ".join(NOTES[name] for name in dict.fromkeys(used)) for kind, used in at_work.items()}
    notes["generator"] = NOTES["gligen" if "gligen" in known else "sketch"]
    return Backends(SkillSegmenter(cutter, detector, known.get("sam")), SkillFiller(filler), generator, names, notes)
