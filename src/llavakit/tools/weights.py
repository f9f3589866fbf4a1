"""Skills with models of transformers, whose weights the user names: detectors, segmentation, captions.

Nothing is downloaded: `model` is a folder. A model is loaded at the first call and kept.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llavakit.tools.skill import BOX, POINT, Outcome, Skill, SkillError, number, parameters, picture

_CAPTION = {"type": "string", "minLength": 1, "maxLength": 1000}


def no_weights(model: str | None) -> str | None:
    """Why a skill whose weights the user names cannot run; None if it can."""
    if model is None:
        return "its weights are not configured; name their folder as `model` in the tools configuration"
    return None if (Path(model) / "config.json").is_file() else f"{model}: holds no config.json of a model"


class Loaded:
    """A model and its processor, loaded once, on first use.

    Args:
        kind: Name of transformers' class of the model.
        model: Its folder.
        device: Where it runs.
    """

    def __init__(self, kind: str, model: str | None, device: str = "cpu") -> None:
        self.kind, self.model, self.device = kind, model, device
        self._lock = threading.Lock()
        self._pair: tuple[Any, Any] | None = None

    def __call__(self) -> tuple[Any, Any]:
        """The model and the processor.

        Raises:
            SkillError: If the folder holds something else.
        """
        import transformers

        with self._lock:
            if self._pair is None:
                try:
                    processor = transformers.AutoProcessor.from_pretrained(self.model, local_files_only=True)
                    net = getattr(transformers, self.kind).from_pretrained(self.model, local_files_only=True)
                except (OSError, ValueError, KeyError, ImportError) as error:
                    said = " ".join(str(error).split())
                    raise SkillError(f"{self.model}: cannot be loaded as {self.kind} ({said})") from None
                self._pair = net.to(self.device).eval(), processor
            return self._pair


def _detected(boxes: Any, scores: Any, phrases: Sequence[str], size: tuple[int, int]) -> Outcome:
    """A detector's result; boxes come as corners in pixels."""
    width, height = size
    whole = np.array([width, height, width, height], np.float32)
    rows = [[round(float(edge), 4) for edge in np.asarray(box, np.float32) / whole] for box in boxes]
    data = {"boxes": rows, "logits": [round(float(score), 4) for score in scores], "phrases": list(phrases)}
    return Outcome(data | {"size": [height, width]})


def grounding_dino(model: str | None = None, device: str = "cpu") -> Skill:
    """Grounding DINO: boxes of what a caption names."""
    loaded = Loaded("AutoModelForZeroShotObjectDetection", model, device)

    def run(image: Image.Image, caption: str, box_threshold: float = 0.3, text_threshold: float = 0.25) -> Outcome:
        import torch

        net, processor = loaded()
        text = caption.lower().strip()
        inputs = processor(images=image, text=text if text.endswith(".") else f"{text}.", return_tensors="pt")
        with torch.inference_mode():
            outputs = net(**inputs.to(device))
        found = processor.post_process_grounded_object_detection(
            outputs,
            inputs.input_ids,
            threshold=box_threshold,
            text_threshold=text_threshold,
            target_sizes=[(image.height, image.width)],
        )[0]
        return _detected(found["boxes"], found["scores"], found.get("text_labels", found["labels"]), image.size)

    return Skill(
        name="grounding_dino",
        description="Find the objects that a caption names and give their boxes.",
        parameters=parameters(
            ("caption",),
            image=picture(),
            caption=_CAPTION | {"description": "Objects, separated by ' . '."},
            box_threshold=number("Score below which a box is left out.", 0, 1, 0.3),
            text_threshold=number("Score below which a word is left out.", 0, 1, 0.25),
        ),
        function=run,
        needs=("transformers", "weights of Grounding DINO"),
        missing=no_weights(model),
        shared=False,
    )


def owlv2(model: str | None = None, device: str = "cpu") -> Skill:
    """OWLv2: boxes of what phrases name."""
    loaded = Loaded("Owlv2ForObjectDetection", model, device)

    def run(image: Image.Image, caption: str, box_threshold: float = 0.1) -> Outcome:
        import torch

        net, processor = loaded()
        phrases = [phrase.strip() for phrase in caption.split(".") if phrase.strip()]
        if not phrases:
            raise SkillError("owlv2: caption names nothing")
        inputs = processor(text=[phrases], images=image, return_tensors="pt", truncation=True)
        with torch.inference_mode():
            outputs = net(**inputs.to(device))
        found = processor.post_process_grounded_object_detection(
            outputs, threshold=box_threshold, target_sizes=[(image.height, image.width)], text_labels=[phrases]
        )[0]
        return _detected(found["boxes"], found["scores"], found["text_labels"], image.size)

    return Skill(
        name="owlv2",
        description="Find the objects that phrases name and give their boxes.",
        parameters=parameters(
            ("caption",),
            image=picture(),
            caption=_CAPTION | {"description": "Objects, separated by ' . '."},
            box_threshold=number("Score below which a box is left out.", 0, 1, 0.1),
        ),
        function=run,
        needs=("transformers", "weights of OWLv2"),
        missing=no_weights(model),
        shared=False,
    )


def sam(model: str | None = None, device: str = "cpu") -> Skill:
    """SAM: masks of boxes or points."""
    loaded = Loaded("SamModel", model, device)

    def run(
        image: Image.Image,
        boxes: Sequence[Sequence[float]] | None = None,
        points: Sequence[Sequence[float]] | None = None,
        point_labels: Sequence[int] | None = None,
    ) -> Outcome:
        import torch

        if not boxes and not points:
            raise SkillError("sam: give boxes or points")
        if points and point_labels is not None and len(point_labels) != len(points):
            raise SkillError(f"sam: {len(point_labels)} point_labels for {len(points)} points; give one each")
        net, processor = loaded()
        size = np.array([image.width, image.height], np.float32)
        prompts: dict[str, Any] = {}
        if boxes:
            prompts["input_boxes"] = [(np.asarray(boxes, np.float32) * np.tile(size, 2)).tolist()]
        else:
            prompts["input_points"] = [(np.asarray(points, np.float32) * size).tolist()]
            prompts["input_labels"] = [list(point_labels or [1] * len(points or ()))]
        inputs = processor(images=image, return_tensors="pt", **prompts).to(device)
        with torch.inference_mode():
            outputs = net(**inputs, multimask_output=False)
        masks = processor.image_processor.post_process_masks(
            outputs.pred_masks.cpu(), inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu()
        )[0]
        found = tuple(mask.numpy().astype(bool) for mask in masks.flatten(0, 1))
        return Outcome({"boxes": [list(map(float, box)) for box in boxes or ()]}, masks=found)

    return Skill(
        name="sam",
        description="Cut out what boxes or points mark.",
        parameters=parameters(
            image=picture(),
            boxes={"type": "array", "items": BOX, "maxItems": 64, "description": "Boxes, in fractions."},
            points={"type": "array", "items": POINT, "maxItems": 64, "description": "Points on one thing."},
            point_labels={"type": "array", "items": {"enum": [0, 1]}, "description": "0 for a point beside it."},
        ),
        function=run,
        needs=("transformers", "weights of SAM"),
        missing=no_weights(model),
        shared=False,
    )


def blip2(model: str | None = None, device: str = "cpu", max_new_tokens: int = 20) -> Skill:
    """BLIP-2: a caption."""
    loaded = Loaded("AutoModelForImageTextToText", model, device)

    def run(image: Image.Image) -> Outcome:
        import torch

        net, processor = loaded()
        inputs = processor(images=image, return_tensors="pt").to(device)
        with torch.inference_mode():
            ids = net.generate(**inputs, max_new_tokens=max_new_tokens)
        caption = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        return Outcome({"caption": caption, "size": [image.height, image.width]})

    return Skill(
        name="blip2",
        description="Describe the picture in one sentence.",
        parameters=parameters(image=picture()),
        function=run,
        needs=("transformers", "weights of BLIP-2"),
        missing=no_weights(model),
        shared=False,
    )
