"""LLaVA-OneVision's golden components of views: choice of canvas, plans, pixels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llavakit.proof.golden import Case, Result
from llavakit.registry import ARRANGEMENTS, PLANNERS
from llavakit.systems.llava_onevision.checkpoint import media_of
from llavakit.views import tiles
from llavakit.views.plan import MediaSize, Plan


def select_best_resolution(case: Case) -> dict[str, Any]:
    """The canvas of every size."""
    return {
        "best": [
            tiles.select_canvas(tuple(query["size"]), [tuple(canvas) for canvas in query["possible"]])
            for query in case.inputs["queries"]
        ]
    }


def _pinpoints(written: Any, tile: int) -> Any:
    """Canvases of a case; a sentence such as `all (384*i,384*j), i,j in 1..6` is read too."""
    bounds = re.search(r"(\d+)\.\.(\d+)", written) if isinstance(written, str) else None
    if not bounds:
        return written
    first, last = int(bounds[1]), int(bounds[2])
    return [[i * tile, j * tile] for i in range(first, last + 1) for j in range(first, last + 1)]


class Planned:
    """Plans and arrangements of a case's configuration.

    Args:
        config: `tower_image_size`, `side`, `image_grid_pinpoints`.
        ratio: `image_aspect_ratio`.
        rounding: See `SpatialUnpad`.
    """

    def __init__(self, config: Mapping[str, Any], ratio: str, rounding: str = "int") -> None:
        size, side = config["tower_image_size"], config["side"]
        raw = {
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": ratio,
            "image_grid_pinpoints": _pinpoints(config["image_grid_pinpoints"], size),
        }
        image = media_of(raw, size, rounding=rounding)["image"]
        self.planner, self.arrangement = PLANNERS.build(image["views"]), ARRANGEMENTS.build(image["arrange"])
        self.grid = (1, side, side)

    def plan(self, size: tuple[int, int]) -> Plan:
        """The plan of an image of (width, height)."""
        return self.planner.plan(MediaSize(1, size[1], size[0]))

    def counts(self, plan: Plan) -> dict[str, int]:
        """Rows and columns of the map after the base view, and tokens in all."""
        grids = [self.grid] * len(plan.views)
        rows, cols = self.arrangement.map_size(plan, grids)
        return {"rows": rows, "cols": cols, "tokens": sum(run.visual for run in self.arrangement.layout(plan, grids))}


def anyres_plan(case: Case) -> dict[str, Any]:
    """Every plan by image size; large images are recorded without their pixels' places."""
    config = case.config
    planned = {ratio: Planned(config, ratio) for ratio in config["aspect_ratios"]}
    first = next(iter(planned.values()))
    plans = []
    for (width, height), wanted in zip(case.inputs["sizes"], case.wanted.json["plans"], strict=True):
        plan = first.plan((width, height))
        side = config["side"]
        rows, cols = tiles.unpad((width, height), plan.rows * side, plan.cols * side)
        left, top, right, bottom = plan.content
        facts = {
            "size": [width, height],
            "best_resolution": plan.canvas[::-1],
            "resized": [right - left, bottom - top],
            "paste": [left, top],
            "crops": len(plan.views) - 1,
            "grid_wh": [plan.cols, plan.rows],
            "unpadded_hw": [rows.stop - rows.start, cols.stop - cols.start],
            **{ratio: own.counts(plan) for ratio, own in planned.items()},
        }
        plans.append({key: value for key, value in facts.items() if key in wanted})
    return {"plans": plans}


def anyres_plan_transformers(case: Case) -> dict[str, Any]:
    """Every plan as transformers counts it."""
    planned = Planned(case.config, case.config["vision_aspect_ratio"], rounding="hf")
    plans = []
    for width, height in case.inputs["sizes"]:
        plan = planned.plan((width, height))
        plans.append({"size": [width, height], "views": len(plan.views), **planned.counts(plan)})
    return {"plans": plans}


# Pixels


def image_of(array: Tensor) -> Image.Image:
    """A picture of an 8-bit tensor [height, width, 3]."""
    return Image.fromarray(array.numpy())


def views_of(options: Mapping[str, Any], image: Image.Image) -> Tensor:
    """All views of an image, [views, 3, size, size]."""
    planner = PLANNERS.build(dict(options))
    return torch.from_numpy(np.stack(planner.cut(image, planner.plan(MediaSize(1, image.height, image.width)))))


def process_anyres_image(case: Case) -> dict[str, Tensor]:
    """Base view and tiles of every image."""
    raw = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": case.config["image_grid_pinpoints"]}
    options = media_of(raw, case.config["size"])["image"]["views"]
    return {name: views_of(options, image_of(array)) for name, array in case.tensors.items()}


def process_images(case: Case) -> Result:
    """Several images under several settings; equal shapes come stacked."""
    case.informational("inputs.*.model_config.image_grid_pinpoints")
    inputs = case.tensors
    facts: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for run, request in case.inputs.items():
        options = media_of(request["model_config"], case.config["size"])["image"]["views"]
        views = [views_of(options, image_of(inputs[name])) for name in request["images"]]
        if options["type"] != "anyres":
            views = [view[0] for view in views]
        if len({view.shape for view in views}) == 1:
            tensors[run] = torch.stack(views)
            facts[run] = {"kind": "tensor", "shape": tensors[run].shape}
        else:
            tensors |= {f"{run}/{number}": view for number, view in enumerate(views)}
            facts[run] = {"kind": "list", "shapes": [view.shape for view in views]}
    return Result(json=facts, tensors=tensors)


def siglip_preprocess(case: Case) -> dict[str, Tensor]:
    """Pictures and videos squashed and normalised, [frames, 3, size, size]."""
    media = media_of({}, case.config["size"])
    frame = media["video"]["views"]["frame"]
    outputs = {}
    for name, array in case.tensors.items():
        frames = array if array.dim() == 4 else array[None]
        outputs[name] = torch.cat([views_of(frame, image_of(picture)) for picture in frames])
    return outputs


ADAPTERS = {
    "select_best_resolution": select_best_resolution,
    "anyres_plan": anyres_plan,
    "anyres_plan_transformers": anyres_plan_transformers,
    "process_anyres_image": process_anyres_image,
    "process_images": process_images,
    "siglip_preprocess": siglip_preprocess,
}
