"""What objectives share that train a vision encoder alone, without connector and language model.

The recipe's parts are an encoder (`vision_config`, or `init.vision_tower`) and the views of its images
(`media.image.views`). What a stage leaves is a folder that transformers reads and that another recipe takes as
`parts.init.vision_tower`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, set_seed

from llavakit.checkpoints.files import assign_state, atomic_folder, read_folder, read_json, write_state
from llavakit.connectors.base import tokens_in
from llavakit.conversation.messages import FieldError
from llavakit.data.records import Record, belongs_to, open_media, read_record
from llavakit.errors import RecipeError, UserError
from llavakit.media.image import image_size, load_image
from llavakit.model.configuration import build_config
from llavakit.registry import PLANNERS
from llavakit.training.build import initialise_encoder, part_config
from llavakit.training.dataset import Failure
from llavakit.training.objectives.base import Objective, Run
from llavakit.training.recipe import Recipe
from llavakit.views.plan import MediaSize
from llavakit.vision.geometry import geometry_of

VIEWS = "views.json"


class ImageViews:
    """Cuts images for an encoder; takes the place of a whole model's processor.

    Args:
        options: `{"type": planner, **options}`.

    Raises:
        UserError: If the planner or an option is unknown.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.planner = PLANNERS.build(self.options)

    def cut(self, image: Any) -> list[Tensor]:
        """Views of a PIL image, float32 [3, height, width] each, normalised."""
        plan = self.planner.plan(MediaSize(1, image.height, image.width))
        return [torch.from_numpy(view) for view in self.planner.cut(image, plan)]

    def save_pretrained(self, folder: Path) -> None:
        """Write `views.json`."""
        (folder / VIEWS).write_text(json.dumps(self.options, indent=2) + "\n", encoding="utf-8")


class ViewCollator:
    """Batches of views: `pixel_values` [views, channels, height, width] of all samples, and their `tokens`."""

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any] | Failure:
        failed = next((sample for sample in samples if isinstance(sample, Failure)), None)
        if failed is not None:
            return failed
        views = torch.stack([view for sample in samples for view in sample["pixel_values"]])
        return {"pixel_values": views, "tokens": sum(sample["tokens"] for sample in samples)}


class EncoderObjective(Objective):
    """Base of objectives whose module is an encoder and whose records are images.

    A record is `{"image": path}` with whatever else a subclass reads from `Record.raw`. A subclass defines `loss`,
    whose value is summed over views; `model(batch["pixel_values"])` is the encoder's output.
    """

    family: ClassVar[str] = "encoder"

    # the module

    def describe(self, recipe: Recipe) -> tuple[Any, ImageViews]:
        """The encoder's configuration, and its views."""
        if recipe.parts is None:
            raise RecipeError("model: an encoder is trained alone from `parts`: vision_config, or init.vision_tower")
        config = part_config(recipe.parts, "vision_config")
        image = (recipe.parts.media or {}).get("image", {})
        size = getattr(config, "image_size", 224)
        try:
            return config, ImageViews(image.get("views", {"type": "square", "size": size}))
        except UserError as error:
            raise RecipeError(f"parts.media.image.views: {error}") from None

    def skeleton(self, config: Any) -> nn.Module:
        """The encoder on meta tensors."""
        with torch.device("meta"):
            return AutoModel.from_config(config)

    def build(self, recipe: Recipe) -> tuple[nn.Module, ImageViews]:
        """The encoder with the weights of `init.vision_tower`, or at random."""
        config, views = self.describe(recipe)
        set_seed(recipe.seed)
        encoder = AutoModel.from_config(config)
        if "vision_tower" in recipe.parts.init:
            initialise_encoder(encoder, recipe.parts.init["vision_tower"], "parts.init.vision_tower")
        return encoder, views

    def load(self, folder: Path) -> tuple[nn.Module, ImageViews]:
        """What `save` wrote; every tensor is checked."""
        raw = read_json(folder / "config.json")
        encoder = AutoModel.from_config(build_config(raw, raw["model_type"]))
        assign_state(encoder, read_folder(folder), where=str(folder))
        return encoder, ImageViews(read_json(folder / VIEWS))

    def save(self, state: Mapping[str, Tensor], config: Any, processor: ImageViews, folder: Path) -> None:
        """Configuration and weights as transformers writes them, and the views."""
        with atomic_folder(Path(folder)) as scratch:
            config.save_pretrained(scratch)
            write_state(scratch, state.items())
            processor.save_pretrained(scratch)

    # from records to batches

    def bind(self, config: Any, processor: ImageViews) -> None:
        """Remember how images are cut."""
        self.views, self.geometry = processor, geometry_of(config)

    def read(self, raw: Any, file: str, line: int, **options: Any) -> Record:
        """The image of an entry; an answer is not needed."""
        with belongs_to(file, line):
            if not isinstance(raw, Mapping) or not isinstance(raw.get("image"), (str, bytes, Mapping)):
                raise FieldError("image", "must name or hold the image of the record")
        message = {"role": "user", "content": [{"type": "image", "image": raw["image"]}]}
        found = read_record({"messages": [message]}, file, line, **options | {"needs_answer": False})
        return Record(found.messages, file, line, raw)

    def encode(self, record: Record, *, media: bool = True) -> dict[str, Any]:
        """`pixel_values`, one tensor per view, and `tokens`, the positions of their features."""
        sample: dict[str, Any] = {"pixel_values": [], "tokens": 0}
        for _, (image, size) in open_media(record, _open if media else _measure):
            plan = self.views.planner.plan(size)
            sample["tokens"] += sum(tokens_in(self.geometry.grid(view)) for view in plan.views)
            if media:
                sample["pixel_values"] += self.views.cut(image)
        return sample

    def length(self, sample: Mapping[str, Any]) -> int:
        """Positions of the features."""
        return sample["tokens"]

    def collator(self, run: Run) -> Callable[[Sequence[Any]], Any]:
        """Views of equal size, one after another."""
        return ViewCollator()

    # learning

    def items(self, batch: Mapping[str, Any]) -> int:
        """Views."""
        return len(batch["pixel_values"])


def _open(part: Mapping[str, Any]) -> tuple[Any, MediaSize]:
    image = load_image(part["image"])
    return image, MediaSize(1, image.height, image.width)


def _measure(part: Mapping[str, Any]) -> tuple[None, MediaSize]:
    return None, image_size(part["image"])
