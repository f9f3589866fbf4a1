"""Skills with pipelines of diffusers, whose weights the user names: pictures made, edited and filled.

Nothing is downloaded: `model` is a folder. A pipeline is loaded at the first call and kept.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llavakit.tools.skill import BOX, Outcome, Skill, SkillError, absent, mask, parameters, picture

_PROMPT = {"type": "string", "minLength": 1, "maxLength": 1000}
_SEED = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1, "description": "Makes the picture repeatable."}


class Pipeline:
    """A pipeline of diffusers, loaded once, on first use.

    Args:
        kind: Name of its class.
        model: Its folder.
        device: Where it runs.
        parts: Folders of further parts, by the pipeline's argument and their class.
    """

    def __init__(
        self, kind: str, model: str | None, device: str = "cpu", parts: dict[str, tuple[str, str]] | None = None
    ) -> None:
        self.kind, self.model, self.device, self.parts = kind, model, device, parts or {}
        self._lock = threading.Lock()
        self._pipeline: Any = None

    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        why = absent("diffusers", "diffusers")
        if why is not None:
            return why
        if self.model is None:
            return "its weights are not configured; name their folder as `model` in the tools configuration"
        found = (Path(self.model) / "model_index.json").is_file()
        return None if found else f"{self.model}: holds no model_index.json of a pipeline"

    def __call__(self, seed: int | None = None, **arguments: Any) -> Image.Image:
        """The picture that the pipeline makes.

        Raises:
            SkillError: If the folder holds something else.
        """
        import diffusers
        import torch

        with self._lock:
            if self._pipeline is None:
                try:
                    extra = {
                        name: getattr(diffusers, kind).from_pretrained(place, local_files_only=True)
                        for name, (kind, place) in self.parts.items()
                    }
                    made = getattr(diffusers, self.kind).from_pretrained(self.model, local_files_only=True, **extra)
                except (OSError, ValueError, KeyError, AttributeError) as error:
                    said = " ".join(str(error).split())
                    raise SkillError(f"{self.model}: cannot be loaded as {self.kind} ({said})") from None
                self._pipeline = made.to(self.device)
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            return self._pipeline(**arguments, generator=generator).images[0]


def _skill(name: str, description: str, pipeline: Pipeline, schema: dict[str, Any], run: Any, weights: str) -> Skill:
    return Skill(
        name=name,
        description=description,
        parameters=schema,
        function=run,
        needs=("diffusers", f"weights of {weights}"),
        missing=pipeline.missing(),
        shared=False,
    )


def _edited(picture: Image.Image, name: str = "edited_image") -> Outcome:
    return Outcome(pictures={name: picture})


def stable_diffusion(model: str | None = None, device: str = "cpu", steps: int = 20) -> Skill:
    """Stable Diffusion: a picture of a text."""
    pipeline = Pipeline("StableDiffusionPipeline", model, device)

    def run(prompt: str, seed: int | None = None) -> Outcome:
        return _edited(pipeline(seed, prompt=prompt, num_inference_steps=steps))

    schema = parameters(("prompt",), prompt=_PROMPT | {"description": "What to show."}, seed=_SEED)
    return _skill("stable_diffusion", "Make a picture of a text.", pipeline, schema, run, "Stable Diffusion")


def instruct_pix2pix(model: str | None = None, device: str = "cpu", steps: int = 30, side: int = 512) -> Skill:
    """InstructPix2Pix: the picture changed as a text says."""
    pipeline = Pipeline("StableDiffusionInstructPix2PixPipeline", model, device)

    def run(image: Image.Image, prompt: str, seed: int | None = None) -> Outcome:
        shown = image.resize((side, side))
        made = pipeline(seed, prompt=prompt, image=shown, num_inference_steps=steps, image_guidance_scale=1.0)
        return _edited(made)

    schema = parameters(("prompt",), image=picture(), prompt=_PROMPT | {"description": "What to change."}, seed=_SEED)
    return _skill("instruct_pix2pix", "Change the picture as told.", pipeline, schema, run, "InstructPix2Pix")


def stable_inpainting(model: str | None = None, device: str = "cpu", steps: int = 20, side: int = 512) -> Skill:
    """Stable Diffusion's inpainting: something new in an area of the picture."""
    pipeline = Pipeline("StableDiffusionInpaintPipeline", model, device)

    def run(image: Image.Image, mask: np.ndarray, prompt: str, seed: int | None = None) -> Outcome:
        if mask.shape != (image.height, image.width):
            raise SkillError(f"mask: is {mask.shape[1]} x {mask.shape[0]} pixels, the picture {image.size}")
        hole = Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side))
        made = pipeline(
            seed, prompt=prompt, image=image.resize((side, side)), mask_image=hole, num_inference_steps=steps
        )
        return _edited(made.resize(image.size))

    schema = parameters(
        ("prompt",),
        image=picture(),
        mask=mask(),
        prompt=_PROMPT | {"description": "What to show there."},
        seed=_SEED,
    )
    return _skill("stable_inpainting", "Put something new there.", pipeline, schema, run, "SD inpainting")


def gligen(model: str | None = None, device: str = "cpu", steps: int = 50) -> Skill:
    """GLIGEN: things at given places, in a new picture or in this one."""
    pipeline = Pipeline("StableDiffusionGLIGENPipeline", model, device)

    def run(
        prompt: str,
        phrases: Sequence[str],
        boxes: Sequence[Sequence[float]],
        background: Image.Image | None = None,
        seed: int | None = None,
    ) -> Outcome:
        if len(phrases) != len(boxes):
            raise SkillError(f"gligen: {len(phrases)} phrases for {len(boxes)} boxes; give one each")
        shown = {} if background is None else {"gligen_inpaint_image": background}
        made = pipeline(
            seed,
            prompt=prompt,
            gligen_phrases=list(phrases),
            gligen_boxes=[list(box) for box in boxes],
            gligen_scheduled_sampling_beta=1.0,
            num_inference_steps=steps,
            **shown,
        )
        return _edited(made)

    schema = parameters(
        ("prompt", "phrases", "boxes"),
        background=picture("The picture in which things are put; without one a new picture is made."),
        prompt=_PROMPT | {"description": "The whole picture."},
        phrases={"type": "array", "items": _PROMPT, "minItems": 1, "maxItems": 30, "description": "One per box."},
        boxes={"type": "array", "items": BOX, "minItems": 1, "maxItems": 30, "description": "In fractions."},
        seed=_SEED,
    )
    return _skill("gligen", "Draw things at given places.", pipeline, schema, run, "GLIGEN")


def controlnet(model: str | None = None, control: str | None = None, device: str = "cpu", steps: int = 20) -> Skill:
    """ControlNet: a picture of a text that follows a segmentation."""
    parts = {} if control is None else {"controlnet": ("ControlNetModel", control)}
    pipeline = Pipeline("StableDiffusionControlNetPipeline", model, device, parts)

    def run(image: Image.Image, prompt: str, seed: int | None = None) -> Outcome:
        return _edited(pipeline(seed, prompt=prompt, image=image, num_inference_steps=steps))

    schema = parameters(
        ("prompt",),
        image=picture("The segmentation to follow."),
        prompt=_PROMPT | {"description": "What to show."},
        seed=_SEED,
    )
    return _skill("controlnet", "Make a picture that follows a layout.", pipeline, schema, run, "ControlNet")
