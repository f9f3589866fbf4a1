"""Image processors of transformers' folders as planner options, and back.

What a folder's files say decides: size, crop, filter, mean, deviation, padding. The planner that comes out must give
the very pixels of transformers' processor, which is tried on two pictures before anything is built on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.files import naming, read_json
from llavakit.errors import CheckpointError, quoted
from llavakit.registry import PLANNERS
from llavakit.views.pixels import pad_colour, resampling
from llavakit.views.plan import MediaSize

PROCESSOR, OLD_PROCESSOR = "processor_config.json", "preprocessor_config.json"
TOLERANCE = 1e-5
LARGEST_SIDE = 8192  # of an encoder's input
PADS = "LlavaImageProcessor"  # the one whose do_pad means a square around the whole picture
IMAGE_INERT = dict.fromkeys(
    (
        *("image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys", "data_format"),
        *("input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square", "do_convert_rgb"),
        *("image_seq_length", "backend", "pad_size"),
    ),
    "says how transformers' class runs, not which pixels it gives for one picture",
)
_SIZES = (MediaSize(1, 61, 97), MediaSize(1, 83, 41))


def image_options(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """Options of a folder's image processor and the file that holds them; None if there is no such file.

    Raises:
        CheckpointError: If the file is broken.
    """
    for name in (PROCESSOR, OLD_PROCESSOR):
        path = folder / name
        if path.is_file():
            raw = read_json(path)
            nested = raw.get("image_processor")
            if nested is None and name == PROCESSOR:
                continue
            options = raw if nested is None else nested
            if not isinstance(options, Mapping):
                raise CheckpointError(f"{path}: image_processor is {quoted(options)}, it should be an object")
            return dict(options), path
    return None


def planner_options(folder: Path) -> dict[str, Any] | None:
    """`media.image.views` that give the pixels of a folder's image processor; None if the folder has none.

    Raises:
        CheckpointError: If llavakit has no planner that does what the processor does; the message names the option.
    """
    found = image_options(folder)
    if found is None:
        return None
    from transformers import AutoImageProcessor

    options, path = found
    with naming(path):
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        views = _views(processor, Fields(options, str(path)), path)
        _compare(processor, views, path)
    return views


def _views(processor: Any, options: Fields, path: Path) -> dict[str, Any]:
    def has(name: str) -> Any:
        options.get(name)  # its value is in the processor, beside what its class fills in
        return getattr(processor, name, None)

    if not has("do_resize"):
        raise CheckpointError(f"{path}: do_resize is off, so pictures would reach the encoder in any size")
    size, crop, resample = dict(has("size") or {}), dict(has("crop_size") or {}), has("resample")
    cropped, padded = bool(has("do_center_crop")), bool(has("do_pad")) and type(processor).__name__.startswith(PADS)
    rescaled, factor = has("do_rescale"), has("rescale_factor")
    normalised, mean, std = has("do_normalize"), has("image_mean"), has("image_std")
    options.finish(IMAGE_INERT)
    size = {name: value for name, value in size.items() if value}
    crop = {name: value for name, value in crop.items() if value} if cropped else {}
    if set(size) == {"shortest_edge"}:
        kind, side = "square", size["shortest_edge"]
        if not cropped and not padded:
            raise CheckpointError(f"{path}: do_center_crop is off with size {quoted(size)}, so views have any width")
    elif set(size) == {"height", "width"} and size["height"] == size["width"]:
        kind, side = "squash", size["height"]
    else:
        raise CheckpointError(
            f"{path}: size is {quoted(size)}; llavakit reads shortest_edge, or a height and a width that are equal"
        )
    if crop and (set(crop) != {"height", "width"} or crop["height"] != crop["width"]):
        raise CheckpointError(
            f"{path}: crop_size is {quoted(crop)}; llavakit reads a height and a width that are equal"
        )
    for value in (side, crop.get("height", side)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIDE:
            raise CheckpointError(
                f"{path}: size and crop_size: {quoted(value)} is no side of 1 to {LARGEST_SIDE} pixels"
            )
    views: dict[str, Any] = {"type": "pad" if padded else kind, "size": side}
    if crop and crop["height"] != side:
        views["crop"] = crop["height"]
    views["image_mean"], views["image_std"] = (list(mean), list(std)) if normalised else ([0.0] * 3, [1.0] * 3)
    if resampling(int(resample)) != resampling("bicubic"):
        views["resample"] = resampling(int(resample)).name.lower()
    if not rescaled or factor != 1 / 255:
        views["rescale_factor"] = float(factor) if rescaled else 1.0
    return views


def pictures() -> list[Image.Image]:
    """Two pictures of known content, one lying and one standing."""
    generator = np.random.default_rng(0)
    shapes = [generator.integers(0, 256, (size.height, size.width, 3), np.uint8) for size in _SIZES]
    return [Image.fromarray(shape) for shape in shapes]


def _compare(processor: Any, views: Mapping[str, Any], path: Path) -> None:
    planner = PLANNERS.build(dict(views))
    for image, size in zip(pictures(), _SIZES, strict=True):
        found = processor(images=image, return_tensors="np")
        theirs = np.asarray(found["pixel_values" if "pixel_values" in found else "pixel_values_images"])[0]
        ours = planner.cut(image, planner.plan(size))[0]
        if theirs.shape != ours.shape or np.abs(theirs - ours).max() > TOLERANCE:
            name = type(processor).__name__.removesuffix("Pil")
            raise CheckpointError(
                f"{path}: image_processor_type {name!r} gives other pixels than any planner of llavakit"
            )


def processor_options(views: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The inverse of `planner_options`: options of transformers' `LlavaImageProcessor`, or why there are none.

    Returns:
        Options and None, or None and an objection that names the option.
    """
    planner = PLANNERS.build(dict(views))
    kind = views["type"]
    if kind not in ("square", "pad", "squash"):
        return None, f"media.image.views.type: transformers' processors do not cut {kind!r} views"
    if kind == "pad" and tuple(planner.background) != pad_colour(planner.image_mean):
        return None, f"media.image.views.background: transformers pads with {list(pad_colour(planner.image_mean))}"
    size = {"height": planner.size, "width": planner.size} if kind == "squash" else {"shortest_edge": planner.size}
    return {
        "do_resize": True,
        "size": size,
        "resample": int(planner.resample),
        "do_center_crop": True,
        "crop_size": {"height": planner.crop, "width": planner.crop},
        "do_pad": kind == "pad",
        "do_rescale": True,
        "rescale_factor": views.get("rescale_factor", 1 / 255),
        "do_normalize": True,
        "image_mean": list(planner.image_mean),
        "image_std": list(planner.image_std),
        "do_convert_rgb": True,
    }, None
