"""LLaVA-Plus's tools around the networks in them: what goes in and how results come out, as the model learned it.

    skills:
      grounding_dino: {type: llava_plus_detector, detector: {type: detect_shapes}}
      easyocr: {type: llava_plus_reader}
      sam: {type: llava_plus_segmenter, segmenter: {type: sam, model: weights/sam}}

Boxes are [x0, y0, x1, y1] in fractions to two decimals. Source: `serve/*_worker.py` of the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from llavakit.tools.configuration import build_skill
from llavakit.tools.reading import text_lines
from llavakit.tools.rle import encode_mask
from llavakit.tools.skill import BOX, POINT, Outcome, Skill, SkillError, absent, number, parameters, picture

NMS_IOU = 0.8
TAGGED_SIZE = [384, 384]  # of the pictures that the tagger sees


# Detection


@dataclass(frozen=True)
class Detections:
    """What a detector found, in fractions of the picture.

    Attributes:
        boxes: [boxes, 4]: (centre x, centre y, width, height), or corners.
        scores: One per box.
        phrases: One per box.
        centres: Whether boxes are given by their centres.
    """

    boxes: Any
    scores: Sequence[float]
    phrases: Sequence[str]
    centres: bool = True


def detected(found: Detections, size: tuple[int, int], nms_iou: float = NMS_IOU) -> dict[str, Any]:
    """Published result of a detector: the best first, without boxes that overlap a better one too much.

    Args:
        size: Height and width of the picture.
        nms_iou: Overlap above which the lower score goes, whatever the phrases.
    """
    boxes = np.asarray(found.boxes, np.float32).reshape(-1, 4)
    scores = np.asarray(found.scores, np.float32)
    if found.centres:
        centres, halves = boxes[:, :2], np.float32(0.5) * boxes[:, 2:]
        boxes = np.concatenate([centres - halves, centres + halves], axis=1)
    kept = _suppressed(boxes, scores, nms_iou)
    return {
        "boxes": [[round(float(edge), 2) for edge in boxes[place]] for place in kept],
        "logits": [round(float(scores[place]), 2) for place in kept],
        "phrases": [found.phrases[place] for place in kept],
        "size": list(size),
    }


def _suppressed(boxes: np.ndarray, scores: np.ndarray, most: float) -> list[int]:
    """Places of the boxes that stay, by falling score (torchvision's `nms`, in float32)."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    for place in np.argsort(-scores, kind="stable").tolist():
        for better in kept:
            corner = np.maximum(boxes[place, :2], boxes[better, :2])
            across, down = np.maximum(np.minimum(boxes[place, 2:], boxes[better, 2:]) - corner, np.float32(0))
            overlap = across * down
            union = areas[place] + areas[better] - overlap
            if union and float(overlap / union) > most:
                break
        else:
            kept.append(place)
    return kept


Detector = Callable[[Image.Image, str, float, float], Detections]


def detector_skill(
    detector: Mapping[str, Any] | Detector | str | None = None, nms_iou: float = NMS_IOU, name: str = "grounding_dino"
) -> Skill:
    """The skill `grounding_dino` over any detector.

    Args:
        detector: A skill's name or configuration (`{type: owlv2, model: FOLDER}`), or a function of picture, caption
            and both thresholds.
    """
    skill = None if callable(detector) else _configured(detector or "grounding_dino", name)

    def run(image: Image.Image, caption: str, box_threshold: float = 0.3, text_threshold: float = 0.25) -> Outcome:
        if skill is None:
            found = detector(image, caption, box_threshold, text_threshold)
        else:
            wanted = {"caption": caption, "box_threshold": box_threshold, "text_threshold": text_threshold}
            known = {key: value for key, value in wanted.items() if key in skill.properties}
            data = skill(image=image, **known).data
            found = Detections(data["boxes"], data["logits"], data["phrases"], centres=False)
        return Outcome(detected(found, (image.height, image.width), nms_iou))

    return Skill(
        name=name,
        description="Find the objects that a caption names and give their boxes.",
        parameters=parameters(
            ("caption",),
            image=picture(),
            caption={"type": "string", "maxLength": 1000, "description": "Objects, separated by ' . '."},
            box_threshold=number("Score below which a box is left out.", 0, 1, 0.3),
            text_threshold=number("Score below which a word is left out.", 0, 1, 0.25),
        ),
        function=run,
        needs=() if skill is None else skill.needs,
        missing=None if skill is None else skill.missing,
        shared=skill is None or skill.shared,
    )


def _configured(given: Any, name: str) -> Skill:
    options = {"type": given} if isinstance(given, str) else dict(given)
    return build_skill(str(options.get("type", name)), options)


# Reading

Line = tuple[Sequence[Sequence[float]], str, float]  # four corners in pixels, text, confidence


def read(lines: Sequence[Line], size: tuple[int, int]) -> dict[str, Any]:
    """Published result of a reader: boxes from the first and third corner, cut to whole pixels.

    Args:
        size: Width and height of the picture.
    """
    boxes = []
    for corners, _, _ in lines:
        (left, top), (right, bottom) = corners[0], corners[2]
        pixels = int(left), int(top), int(right), int(bottom)
        boxes.append([round(edge / size[place % 2], 2) for place, edge in enumerate(pixels)])
    texts = [text for _, text, _ in lines]
    return {"boxes": boxes, "texts": texts, "scores": [round(float(score), 2) for _, _, score in lines]}


def reader_skill(reader: Callable[[Image.Image], Sequence[Line]] | None = None, name: str = "easyocr") -> Skill:
    """The skill `easyocr`; lines are read by RapidOCR unless a function gives them."""
    missing = absent("rapidocr_onnxruntime", "rapidocr-onnxruntime", "tools") if reader is None else None

    def run(image: Image.Image) -> Outcome:
        return Outcome(read((reader or text_lines)(image), image.size))

    return Skill(
        name=name,
        description="Read the text in the picture.",
        parameters=parameters(image=picture()),
        function=run,
        needs=("rapidocr-onnxruntime",) if reader is None else (),
        missing=missing,
        shared=False,
    )


# Segmentation

Segmenter = Callable[..., Sequence[np.ndarray]]


def segmented(segmenter: Segmenter, size: tuple[int, int], params: Mapping[str, Any]) -> dict[str, Any]:
    """Published result of SAM: a mask for every box, or one for the points; none for an empty list.

    Args:
        segmenter: Called with `boxes` in pixels (float32 [boxes, 4]), or with `points` and `labels`.
        size: Height and width of the picture.
        params: `boxes`, or `points` with `point_labels`, in fractions.
    """
    scale = np.array([size[1], size[0]], np.float32)
    boxes, points = params.get("boxes"), params.get("points")
    masks: Sequence[np.ndarray] = ()
    if boxes is not None:
        if len(boxes):
            masks = segmenter(boxes=np.asarray(boxes, np.float32) * np.tile(scale, 2))
    elif points is not None and len(points):
        labels = params.get("point_labels")
        masks = segmenter(points=np.asarray(points, np.float32) * scale, labels=labels)
    return {"masks_rle": [encode_mask(mask) for mask in masks], "boxes": boxes}


def segmenter_skill(segmenter: Mapping[str, Any] | str | None = None, name: str = "sam") -> Skill:
    """The skill `sam` over a skill that segments (`sam`, or `segment` without weights)."""
    skill = _configured(segmenter or "sam", name)

    def run(
        image: Image.Image,
        boxes: Sequence[Sequence[float]] | None = None,
        points: Sequence[Any] | None = None,
        point_labels: Sequence[Any] | None = None,
    ) -> Outcome:
        if not boxes and not points:
            raise SkillError("sam: give boxes or points")
        if boxes:
            each = [{"box": box} for box in boxes] if "box" in skill.properties else [{"boxes": [box]} for box in boxes]
            masks = tuple(skill(image=image, **marks).masks[0] for marks in each)
            return Outcome({"boxes": [list(box) for box in boxes]}, masks=masks)
        flat = np.asarray(points, float).reshape(-1, 2).tolist()
        labels = None if point_labels is None else [int(one) for one in np.asarray(point_labels).ravel()]
        found = skill(image=image, points=flat, **({} if labels is None else {"point_labels": labels}))
        return Outcome({}, masks=found.masks[:1])

    return Skill(
        name=name,
        description="Cut out what boxes or points mark.",
        parameters=parameters(
            image=picture(),
            boxes={"type": "array", "items": BOX, "maxItems": 64, "description": "Boxes, in fractions."},
            points={"type": "array", "items": {"anyOf": [POINT, {"type": "array"}]}, "maxItems": 64},
            point_labels={"type": "array"},
        ),
        function=run,
        needs=skill.needs,
        missing=skill.missing,
        shared=skill.shared,
    )


def point_of(params: Mapping[str, Any]) -> Any:
    """Where Semantic-SAM looks: the point that is given, or the centres of boxes."""
    if params.get("point") is not None:
        return params["point"]
    return [[(x0 + x1) / 2, (y0 + y1) / 2] for x0, y0, x1, y1 in params.get("boxes") or ()]


# Tags, and tools of two


def tagged(found: Sequence[str]) -> dict[str, Any]:
    """Published result of the tagger: English and Chinese tags, separated by commas."""
    english, chinese = (text.replace(" |", ",") for text in found)
    return {"tags": english, "tags_chinese": chinese, "size": list(TAGGED_SIZE)}


def caption_of_tags(tags: str) -> str:
    """What a detector is asked for after tagging."""
    return tags.replace(",", ".")


WORDS = {"ram": ("tags", "tags_chinese"), "blip2": ("caption",)}  # what goes on from the first of two tools
Run = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


def both(name: str, params: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """The result of a tool of two (`ram+grounding_dino`): the first one's words are what the second looks for.

    Args:
        run: Runs one tool by its name.

    Raises:
        SkillError: If there is no such pair, or the first finds no words.
    """
    first, _, second = name.partition("+")
    found = dict(run(first, params))
    if "error" in found:
        return found
    if first in WORDS and second == "grounding_dino":
        words = {key: found[key] for key in WORDS[first] if key in found}
        caption = caption_of_tags(words["tags"]) if "tags" in words else words.get("caption")
        if not isinstance(caption, str):
            raise SkillError(f"{name}: {first} gave neither tags nor a caption")
        located = dict(run(second, {**params, "caption": caption}))
        return located if "error" in located else located | words
    if first == "grounding_dino" and second == "sam":
        if not found.get("boxes"):
            return found | {"masks_rle": []}
        cut = run(second, {"image": params.get("image"), "boxes": found["boxes"]})
        return dict(cut) if "error" in cut else found | {"masks_rle": cut.get("masks_rle", [])}
    raise SkillError(f"there is no tool {name!r}")
