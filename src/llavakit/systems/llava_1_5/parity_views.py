"""Golden cases of what LLaVA-1.5 and v1.6 do to images before and after the encoder: views, tiles, unpadding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from llavakit.proof.golden import Case, Result
from llavakit.registry import PLANNERS
from llavakit.splice.layout import Flat
from llavakit.splice.tiles import Spatial, SpatialUnpad
from llavakit.systems.llava_1_5.checkpoint import pinpoints_of
from llavakit.views import pixels, tiles
from llavakit.views.plan import MediaSize

_PLANNERS = {"pad": "pad", "anyres": "anyres", "square": "square", None: "square"}


def planner_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options of the planner that a preprocessor's configuration and `image_aspect_ratio` describe."""
    size, crop = config["size"], config.get("crop_size")
    options = {
        "type": _PLANNERS[config.get("image_aspect_ratio")],
        "size": size["shortest_edge"] if isinstance(size, dict) else size,
        "crop": crop["height"] if isinstance(crop, dict) else crop,
        "image_mean": config.get("image_mean", pixels.CLIP_MEAN),
        "image_std": config.get("image_std", pixels.CLIP_STD),
        "resample": str(config.get("resample", "bicubic")).split()[0],
    }
    if options["type"] == "anyres":
        options["pinpoints"] = pinpoints_of(config["image_grid_pinpoints"])
    return options


def image_preprocessing(case: Case) -> Result:
    """Pixels of every image; with padding also the padded square, with tiles also the plan."""
    case.informational("config.image_processor", "config.order", "config.background")
    planner = PLANNERS.build(planner_options(case.config))
    named = {name: Image.fromarray(array.numpy()).convert("RGB") for name, array in case.tensors.items()}
    tensors, plans, views = {}, {}, {}
    for name, image in named.items():
        number = name.removeprefix("image_")
        plan = planner.plan(MediaSize(1, image.height, image.width))
        cut = np.stack(planner.cut(image, plan))
        views[number] = cut if plan.rows else cut[0]
        tensors[f"pixel_values_{number}"] = torch.from_numpy(views[number])
        if plan.rows:
            plans[number] = {
                "best_resolution": plan.canvas[::-1],
                "grid": [plan.cols, plan.rows],
                "views": len(plan.views),
            }
        if case.config.get("image_aspect_ratio") == "pad":
            square = np.array(pixels.pad_to_square(image, planner.background))
            tensors[f"square_{number}"] = torch.from_numpy(square)
    if len({view.shape for view in views.values()}) == 1:
        tensors["pixel_values"] = torch.from_numpy(np.stack(list(views.values())))
    return Result(json=plans or None, tensors=tensors)


def slicing_plan(case: Case) -> Result:
    """Canvas, grid, place of the content, and tokens of every arrangement, by image size."""
    tile, side = case.config["patch_size_of_grid"], case.config["tower_grid"]
    planner = PLANNERS.build({"type": "anyres", "size": tile, "pinpoints": pinpoints_of(case.config["grid_pinpoints"])})
    plans = []
    for width, height in case.inputs["sizes_wh"]:
        plan = planner.plan(MediaSize(1, height, width))
        grids = [(1, side, side)] * len(plan.views)
        rows, cols = tiles.unpad((width, height), plan.rows * side, plan.cols * side)
        kept = SpatialUnpad().map_size(plan, grids)
        plans.append(
            {
                "size_wh": [width, height],
                "best_resolution": plan.canvas[::-1],
                "grid_wh": [plan.cols, plan.rows],
                "content_box_xyxy": plan.content,
                "unpad_first_index": rows.start * plan.cols * side + cols.start,
                "unpad_shape_hw": kept,
                "tokens_spatial_unpad": SpatialUnpad().layout(plan, grids)[0].visual,
                "tokens_flat": Flat().layout(plan, grids)[0].visual,
                "tokens_spatial": Spatial().layout(plan, grids)[0].visual,
            }
        )
    return Result(json={"plans": plans})


def feature_unpadding(case: Case) -> Result:
    """Indices of the feature map that unpadding keeps."""
    kept = []
    for call in case.inputs["calls"]:
        rows, cols = call["grid_hw"]
        window = tiles.unpad(tuple(call["size_wh"]), rows, cols)
        kept.append(np.arange(rows * cols).reshape(rows, cols)[window])
    return Result(json={"kept": kept})


ADAPTERS = {
    "image_preprocessing": image_preprocessing,
    "slicing_plan": slicing_plan,
    "feature_unpadding": feature_unpadding,
}
