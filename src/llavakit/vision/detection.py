"""Open-vocabulary detection with any zero-shot detector of transformers: OWL-ViT, OWLv2, Grounding DINO and their like.

Boxes are converted where they enter: what a detector's post-processing gives are corners in pixels of the picture that
it was told, and nothing converts them again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llavakit.errors import UserError
from llavakit.media.regions import Region

THRESHOLD = 0.2
PROMPT = "a photo of {tag}"  # of detectors that compare a box with one text per tag
_PADS_TO_SQUARE = ("owlv2",)  # at the right or below, so that fractions are of the long side
_READS_ONE_TEXT = ("grounding-dino", "mm-grounding-dino")  # tags as one text "dog. red car."

# Words of questions that name nothing which could be found in a picture.
_FUNCTION_WORDS = """
a an the this that these those there here it its they them their he his she her you your i our we one ones is are was
were be been being do does did has have had can could will would shall should may might must what which who whom whose
where when why how many much and or not no yes if of in on at by to from with without into onto over under above below
behind before after beside between near next front top bottom left right side middle center centre corner background
foreground image picture photo photograph scene figure shown visible seen see look looking describe tell name count
number color colour kind type sort any some all each every other another same as than then most more less least very
just only also please answer question using single word phrase letter option options choice given following correct
detail detailed about for doing made
"""
_EMPTY = frozenset(_FUNCTION_WORDS.split())


def parse_tags(text: str) -> list[str]:
    """The tags of a text "dog | red car" (as RAM++ writes them) or "dog, red car", in lower case."""
    return [tag.strip() for tag in text.replace(" |", ",").lower().split(",")]


def tags_of_question(text: str) -> list[str]:
    """The things that a question names: runs of words that are no function words, from its first line on a picture.

    A rule of thumb for English; give tags where it matters.
    """
    found: list[str] = []
    lines = [line for line in text.replace("<image>", "\n").splitlines() if line.strip()]
    for line in lines[:1]:
        for stretch in re.split(r"[^\w\s'-]", line.lower()):
            run: list[str] = []
            for word in [*stretch.split(), ""]:
                bare = word.strip("'-")
                if bare and bare not in _EMPTY and not bare.isdigit():
                    run.append(bare)
                elif run:
                    found.append(" ".join(run))
                    run = []
    return list(dict.fromkeys(found))


class Detector:
    """A zero-shot detector.

    Args:
        model, processor: Of transformers.
        threshold: Least score of a box.
    """

    def __init__(self, model: Any, processor: Any, threshold: float = THRESHOLD) -> None:
        self.model, self.processor, self.threshold = model, processor, threshold
        self.kind = model.config.model_type

    @classmethod
    def load(cls, folder: str | Path, *, threshold: float = THRESHOLD, device: str = "cpu") -> Detector:
        """The detector in a folder of transformers.

        Raises:
            UserError: If there is none.
        """
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        try:
            model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval().to(device)
            processor = AutoProcessor.from_pretrained(folder)
        except Exception as error:  # transformers raises anything at all on a folder of another kind
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{folder}: no zero-shot detector of transformers ({lines[0][:200]})") from error
        if not hasattr(processor, "post_process_grounded_object_detection"):
            raise UserError(
                f"{folder}: {type(processor).__name__} gives no boxes for tags; use OWLv2 or Grounding DINO"
            )
        return cls(model, processor, threshold)

    def prompts(self, tags: Sequence[str]) -> list[str]:
        """What the detector is asked for every tag."""
        return list(tags) if self.kind in _READS_ONE_TEXT else [PROMPT.format(tag=tag) for tag in tags]

    def target_size(self, width: int, height: int) -> tuple[float, float]:
        """(height, width) of what the detector's fractions are fractions of."""
        side = float(max(width, height))
        return (side, side) if self.kind in _PADS_TO_SQUARE else (float(height), float(width))

    def __call__(self, image: Image.Image, tags: Sequence[str]) -> list[Region]:
        """What is found of the tags in an RGB image; corners in its pixels, truncated to whole numbers.

        Boxes may reach over the edge of the picture. The label of a box is its tag.
        """
        prompts = self.prompts(tags)
        inputs = self.processor(images=image, text=[prompts], return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            outputs = self.model(**inputs)
        post = self.processor.post_process_grounded_object_detection
        options: dict[str, Any] = {"threshold": self.threshold, "target_sizes": [self.target_size(*image.size)]}
        if "text_threshold" in inspect.signature(post).parameters:
            options |= {"text_threshold": self.threshold, "input_ids": inputs["input_ids"]}
        (found,) = post(outputs, **options)
        regions = []
        for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
            name = _tag(label, tags)
            if name is not None:
                corners = (float(int(place)) for place in box)  # toward zero, as published
                regions.append(Region(*corners, label=name, score=float(score)))
        return regions


def _tag(label: Any, tags: Sequence[str]) -> str | None:
    """The tag of a label: its number, or words of the text that was read; None for a filler of the processor."""
    if isinstance(label, str):
        return label if label in tags else next((tag for tag in tags if label and label in tag), label or None)
    return tags[int(label)] if int(label) < len(tags) else None


def entry(name: str | int, regions: Sequence[Region], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An entry of a box file, see `llavakit.data.boxes`."""
    columns = {
        "boxes": [[int(place) for place in region.box] for region in regions],
        "scores": [region.score for region in regions],
        "labels": [region.label for region in regions],
    }
    return {"id": name, **columns, **(more or {})}
