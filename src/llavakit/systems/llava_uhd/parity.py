"""LLaVA-UHD's golden components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig

from llavakit.checkpoints.files import LazyState
from llavakit.checkpoints.layouts import rename_with
from llavakit.connectors.general import Resampler
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.evaluation import processors
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import (
    check_keys,
    fitting,
    loaded,
    picture,
    pope,
    prompt_text,
    published_model,
    scored,
    turns_to_messages,
    view_processor,
    views_of,
)
from llavakit.proof.golden import Case, Example, Result, examples
from llavakit.registry import PLANNERS
from llavakit.systems.llava_uhd.checkpoint import Released
from llavakit.systems.llava_uhd.cost import golden_flops
from llavakit.systems.llava_uhd.partition import NativeSlices, preview_partition
from llavakit.systems.llava_uhd.resampler import SpatialResampler, pool_shape
from llavakit.systems.llava_uhd.schema import SpatialSchema
from llavakit.views.plan import MediaSize, Plan, Planner, View
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of

MARKS = SpatialSchema(column_separator=0, row_separator=1)


def slicer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the planner of a case."""
    named = {"scale_resolution": "size", "patch_size": "patch", "max_slice_nums": "max_slices"}
    named |= {name: name for name in ("image_mean", "image_std")}
    given = {own: config.get(name) for name, own in named.items()}
    return {
        "type": "native_slices",
        "split": not config.get("never_split", False),
        "long_side": config.get("pre_resize"),
        **{name: value for name, value in given.items() if value is not None},
    }


def slicer(config: Mapping[str, Any]) -> NativeSlices:
    """The planner of a case."""
    return PLANNERS.build(slicer_options(config))


def slicing_processor(config: Mapping[str, Any]) -> LlavakitProcessor:
    """A processor that slices as the case does."""
    own = slicer(config)
    media = {"image": {"views": slicer_options(config), "arrange": {"type": "spatial_schema"}}}
    return view_processor(media, {"image_size": own.size, "patch_size": own.patch})


def separators(plan: Plan) -> str:
    """Commas and line breaks of a plan's layout."""
    runs = MARKS.layout(plan, [(1, 1, 1)] * len(plan.views))
    return "".join(",\n"[run.ids[0]] for run in runs if run.ids)


def planner(case: Case) -> Iterator[Example | Result]:
    """Grid, views and separators of many sizes."""
    own = slicer(case.config)
    lost = {}

    def plan(size: Sequence[int]) -> dict[str, Any]:
        width, height = size
        media = MediaSize(1, height, width)
        facts: dict[str, Any] = {"size": [width, height]}
        if own.long_side:
            facts["after_pre_resize"] = list(own.resized(media))
        plan = own.plan(media)
        overview, slices = plan.views[-1], plan.views[:-1]
        return facts | {
            "overview": [overview.width, overview.height],
            "overview_patches_hw": [overview.height // own.patch, overview.width // own.patch],
            "grid_cols_rows": [plan.cols, plan.rows] if slices else None,
            "n_slices": len(slices),
            "slice": [slices[0].width, slices[0].height] if slices else None,
            "slice_patches_hw": [slices[0].height // own.patch, slices[0].width // own.patch] if slices else None,
            "separators": separators(plan),
        }

    for number, size in enumerate(case.inputs["sizes"]):
        if "error" in case.wanted.json["plans"][number]:
            lost[f"plans.{number}*"] = "the original loses a side of the picture there; llavakit keeps one pixel"
        else:
            yield Example(f"plans.{number}", partial(plan, size), f"plans.{number}")
    if lost:
        yield Result(json={"plans": {name.split(".")[1][:-1]: {} for name in lost}}, ignored=lost)


def planner_preview(case: Case) -> Result:
    """The planner of the first public code."""
    config, plans = case.config, []
    for width, height in case.inputs["sizes"]:
        found = preview_partition(width, height, config["max_slice_nums"], config["base"], config["patch_size"])
        plans.append(
            {
                "size": [width, height],
                "grid_cols_rows": list(found["grid"]),
                "slice_patches_wh": list(found["slice_patches"]),
                "overview_patches_wh": list(found["overview_patches"]),
            }
        )
    return Result(json={"plans": plans})


def preprocess(case: Case) -> Result:
    """Pixels of overview and slices."""
    image = picture(case.tensors["image"]).convert("RGB")
    plan = slicer(case.config).plan(MediaSize(1, image.height, image.width))
    views = views_of(slicing_processor(case.config), "image", image)
    tensors = {"overview": views[-1]}
    if len(views) > 1:
        tensors["slices"] = torch.stack(views[:-1])
    grid = [plan.cols, plan.rows] if plan.rows else None
    return Result(json={"grid_cols_rows": grid, "separators": separators(plan)}, tensors=tensors)


def preprocess_fullscale(case: Case) -> Result:
    """Sums and corners of the views of formula images."""
    own, images, processor = slicer(case.config), [], slicing_processor(case.config)
    for width, height in case.inputs["sizes"]:
        y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
        image = Image.fromarray(((7 * x + 13 * y + 29 * c + (x * y) % 97) % 256).astype(np.uint8))
        plan = own.plan(MediaSize(1, height, width))
        views = [view.numpy() for view in views_of(processor, "image", image)]
        images.append(
            {
                "size": [width, height],
                "grid_cols_rows": [plan.cols, plan.rows] if plan.rows else None,
                "views": [_facts(view) for view in (views[-1], *views[:-1])],
            }
        )
    corners = {f"images.*.{corner}": (1e-4, 0.0) for corner in ("top_left_3x3_ch0*", "bottom_right_3x3_ch2*")}
    return Result(json={"images": images}, tolerances=corners)


def _facts(view: np.ndarray) -> dict[str, Any]:
    exact = view.astype(np.float64)
    return {
        "shape": list(view.shape),
        "sum_per_channel": exact.sum(axis=(1, 2)).tolist(),
        "sq_sum": float((exact**2).sum()),
        "top_left_3x3_ch0": view[0, :3, :3].tolist(),
        "bottom_right_3x3_ch2": view[2, -3:, -3:].tolist(),
    }


def clip_native_aspect(case: Case) -> Result:
    """Position tables and hidden states of non-square inputs."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    encoder = CLIPVisionModel(CLIPVisionConfig(**case.config)).eval()
    own = encoder.state_dict()
    encoder.load_state_dict({n if n in own else n.removeprefix("vision_model."): t for n, t in case.weights().items()})
    embeddings = getattr(encoder, "vision_model", encoder).embeddings
    outputs = {}
    with torch.no_grad():
        for name, pixels in case.tensors.items():
            height, width = pixels.shape[-2:]
            table = embeddings.position_embedding.weight[None]
            if (height, width) != (case.config["image_size"],) * 2:
                patch = encoder.config.patch_size
                patches = table.new_empty(1, 1 + (height // patch) * (width // patch), table.shape[-1])
                table = embeddings.interpolate_pos_encoding(patches, height, width)
            outputs[f"{name}_pos"] = table
            outputs[f"{name}_hidden_m2"] = encode_views(encoder, pixels, -2, "default", geometry_of(encoder.config))
    return Result(tensors=outputs)


def build_resampler(cls: type[Resampler], config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Resampler:
    """A resampler with the original's weights."""
    net = cls(
        vision_width=config.get("kv_dim") or config["embed_dim"],
        hidden_size=config["embed_dim"],
        queries=config["grid_size"] ** 2,
        heads=config["num_heads"],
    ).eval()
    published = {f"model.mm_projector.{name}": tensor for name, tensor in weights.items()}
    state = LazyState({name: partial(published.get, name) for name in published}, {})
    layout = Released()
    state = layout.drop_unused(None, state.renamed(rename_with(layout.renames_in())))
    return loaded(net, {name.removeprefix("model.multi_modal_projector."): state[name] for name in state})


def perceiver_resampler(case: Case) -> Result:
    """Queries over whole views."""
    net = build_resampler(Resampler, case.config, case.weights())
    inputs, outputs = case.tensors, {}
    with torch.no_grad():
        for name, (rows, cols) in case.config["features"].items():
            mask = inputs.get(f"{name}_attn_mask")
            outputs[name] = net.resample(
                fitting(inputs[name], net), (1, rows, cols), None if mask is None else mask.bool()
            )
            outputs[f"{name}_key_pos"] = net.key_positions(rows, cols)
    return Result(tensors=outputs)


def spatial_resampler(case: Case) -> Result:
    """Queries over their own regions."""
    net = build_resampler(SpatialResampler, case.config, case.weights())
    inputs, outputs, shapes = case.tensors, {}, {}
    with torch.no_grad():
        for name, (rows, cols) in case.config["features"].items():
            outputs[name] = net.resample(fitting(inputs[name], net), (1, rows, cols))
            shapes[name] = {"pool_hw": list(pool_shape(rows, cols))}
    return Result(json=shapes, tensors=outputs)


def pooling_size(case: Case) -> Result:
    """Points per region by grid."""
    return Result(json={"pool_hw": [list(pool_shape(rows, cols)) for rows, cols in case.inputs["grids_hw"]]})


class GivenSlices(Planner):
    """Plans of views that a case hands over ready-made, looked up by a number in place of the size.

    Args:
        plans: Per number, (height, width) of the overview and of a slice, and the row and column of every slice.
    """

    def __init__(self, plans: Sequence[Any]) -> None:
        self.plans = plans

    def plan(self, size: MediaSize) -> Plan:
        overview, tile, places = self.plans[size.height - 1]
        views = [View(*tile, role="tile", row=row, col=col) for row, col in places]
        rows, cols = (max(column) + 1 for column in zip(*places, strict=True)) if places else (0, 0)
        return Plan("image", size, (*views, View(*overview)), rows=rows, cols=cols)

    def cut(self, item: Any, plan: Plan) -> list[np.ndarray]:
        raise TypeError("the views of a golden case are given")


PLANNERS.add("llava_uhd_given_slices", GivenSlices)


def _places(marks: Sequence[int], row_mark: int) -> list[list[int]]:
    """Row and column of every slice; rows end where the row separator is."""
    places, row, col = [], 0, 0
    for mark in marks:
        places.append([row, col])
        row, col = (row + 1, 0) if mark == row_mark else (row, col + 1)
    return places


def model_of(case: Case, plans: Sequence[Any]) -> LlavakitForConditionalGeneration:
    """The case's model, opened as a released checkpoint."""
    config, resampler = case.config, case.config["resampler"]
    case.informational("config.resampler.embed_dim", "config.resampler.kv_dim")

    def given(own: LlavakitConfig) -> None:
        marks = {"column_separator": config["comma_id"], "row_separator": config["newline_id"]}
        arrange = own.media["image"]["arrange"] | marks
        own.media["image"] = {"views": {"type": "llava_uhd_given_slices", "plans": list(plans)}, "arrange": arrange}

    heads = {"mm_num_queries": resampler["grid_size"] ** 2, "mm_num_heads": resampler["num_heads"]}
    clip = check_keys(config["clip"], CLIPVisionConfig().to_dict(), "config.clip")
    raw = {"model_type": "llava_llama", "mm_projector_type": "adapt_spatial_resampler", **heads, **config["llama"]}
    encoder = {"model_type": "clip_vision_model", **clip}
    return published_model(raw, case.weights(), encoder, change=given)


def end_to_end(case: Case) -> Iterator[Example]:
    """Spliced embeddings, labels, mask, logits and loss of a mixed batch."""
    case.informational("config.n_images", "inputs.patches*")  # patches of an image that is not sliced are a dummy
    inputs, config = case.tensors, case.config
    marks = case.inputs["ind_tokens"]
    plans, entries = [], []
    for number, own in enumerate(marks):
        overview, slices = inputs[f"image{number}"], inputs.get(f"patches{number}")
        overview = overview[0] if overview.dim() == 4 else overview
        slices = list(slices[: len(own)]) if own else []
        tile = list(slices[0].shape[-2:]) if slices else []
        plans.append([list(overview.shape[-2:]), tile, _places(own, config["newline_id"])])
        entries.append(Entry("image", MediaSize(1, number + 1, 1), [*slices, overview]))
    batch = ClassicBatch(
        model_of(case, plans),
        inputs["input_ids"],
        {IMAGE_PLACEHOLDER: entries},
        attention_mask=inputs.get("attention_mask"),
        labels=inputs.get("labels"),
        max_length=config.get("tokenizer_model_max_length"),
        padding_side=config.get("padding_side") or "right",
    )
    yield from batch.examples()


def prompts(case: Case) -> Iterator[Example]:
    """Conversation strings."""

    def written(dialog: Mapping[str, Any]) -> Result:
        turns = [(who, text or "") for who, text in dialog["messages"]]
        opened = turns[-1:] == [(1, "")]
        messages = turns_to_messages(turns[:-1] if opened else turns)
        prompt = prompt_text(dialog["template"], messages, placement="keep", add_generation_prompt=opened)
        shape = ("roles", "sep", "sep2", "system")
        reason = "a field of the original's template object; the prompt shows it"
        return Result(json={"prompt": prompt}, ignored={f"dialogs.*.{key}": reason for key in shape})

    yield from examples(written, case.inputs["dialogs"], "dialogs")


def metric_pope(case: Case) -> Result:
    """POPE's counts and rates."""
    found = pope(case.inputs["answers"], case.inputs["labels"])
    rates = ("F1 score", "Accuracy", "Precision", "Recall", "Yes ratio")
    return Result(json={**found, "summary": [round(found[name], 3) for name in rates]})


def metric_textvqa(case: Case) -> Iterator[Example]:
    """TextVQA's soft accuracy and normaliser."""
    inputs = case.inputs

    def accuracy() -> float:
        rows = inputs.get("pred_list") or []
        texts = [row["pred_answer"] for row in rows]
        return scored("textvqa", texts, [{"answers": row["gt_answers"]} for row in rows])["accuracy"] / 100

    yield Example("accuracy", accuracy, "accuracy")
    yield from examples(processors.vqa_answer, inputs.get("strings") or [], "normalised")


def flops(case: Case) -> Result:
    """Section 12."""
    return Result(json=golden_flops(), ignored={"convention": "words"})


ADAPTERS = {
    "planner": planner,
    "planner_preview": planner_preview,
    "preprocess": preprocess,
    "preprocess_fullscale": preprocess_fullscale,
    "clip_native_aspect": clip_native_aspect,
    "perceiver_resampler": perceiver_resampler,
    "spatial_resampler": spatial_resampler,
    "pooling_size": pooling_size,
    "end_to_end": end_to_end,
    "prompts": prompts,
    "metric_pope": metric_pope,
    "metric_textvqa": metric_textvqa,
    "flops": flops,
}
