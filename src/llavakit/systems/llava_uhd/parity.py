"""LLaVA-UHD's golden components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llavakit.checkpoints.layouts import rename_with
from llavakit.connectors.general import Resampler
from llavakit.conversation.template import get_template
from llavakit.evaluation import processors
from llavakit.evaluation.metrics import answers as metrics
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.golden import Case, Result
from llavakit.splice.layout import Run
from llavakit.splice.scatter import IGNORE, expand
from llavakit.systems.llava_uhd.checkpoint import Released
from llavakit.systems.llava_uhd.cost import golden_flops
from llavakit.systems.llava_uhd.partition import NativeSlices, preview_partition
from llavakit.systems.llava_uhd.resampler import SpatialResampler, pool_shape
from llavakit.systems.llava_uhd.schema import SpatialSchema
from llavakit.views.plan import MediaSize, Plan, Planner, View
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of

PLACEHOLDER = -200
MARKS = SpatialSchema(column_separator=0, row_separator=1)


def slicer(config: Mapping[str, Any]) -> NativeSlices:
    """The planner of a case."""
    normal = {k: config[k] for k in ("image_mean", "image_std") if k in config}
    return NativeSlices(
        size=config["scale_resolution"],
        patch=config["patch_size"],
        max_slices=config["max_slice_nums"],
        split=not config.get("never_split", False),
        long_side=config.get("pre_resize"),
        **normal,
    )


def separators(plan: Plan) -> str:
    """Commas and line breaks of a plan's layout."""
    runs = MARKS.layout(plan, [(1, 1, 1)] * len(plan.views))
    return "".join(",\n"[run.ids[0]] for run in runs if run.ids)


def planner(case: Case) -> Result:
    """Grid, views and separators of many sizes."""
    own = slicer(case.config)
    plans = []
    for (width, height), expected in zip(case.inputs["sizes"], case.wanted.json["plans"], strict=True):
        size = MediaSize(1, height, width)
        facts: dict[str, Any] = {"size": [width, height]}
        if "error" in expected and own.long_side and int(own.long_side / max(width, height) * min(width, height)) < 1:
            plans.append(expected)  # the original loses a side there; llavakit keeps one pixel
            continue
        if own.long_side:
            facts["after_pre_resize"] = list(own.resized(size))
        plan = own.plan(size)
        overview, slices = plan.views[-1], plan.views[:-1]
        facts |= {
            "overview": [overview.width, overview.height],
            "overview_patches_hw": [overview.height // own.patch, overview.width // own.patch],
            "grid_cols_rows": [plan.cols, plan.rows] if slices else None,
            "n_slices": len(slices),
            "slice": [slices[0].width, slices[0].height] if slices else None,
            "slice_patches_hw": [slices[0].height // own.patch, slices[0].width // own.patch] if slices else None,
            "separators": separators(plan),
        }
        plans.append(facts)
    return Result(json={"plans": plans})


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
    image = Image.fromarray(case.tensors["image"].numpy())
    own = slicer(case.config)
    plan = own.plan(MediaSize(1, image.height, image.width))
    views = [torch.from_numpy(view) for view in own.cut(image, plan)]
    tensors = {"overview": views[-1]}
    if len(views) > 1:
        tensors["slices"] = torch.stack(views[:-1])
    grid = [plan.cols, plan.rows] if plan.rows else None
    return Result(json={"grid_cols_rows": grid, "separators": separators(plan)}, tensors=tensors)


def preprocess_fullscale(case: Case) -> Result:
    """Sums and corners of the views of formula images."""
    own, images = slicer(case.config), []
    for width, height in case.inputs["sizes"]:
        y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
        image = Image.fromarray(((7 * x + 13 * y + 29 * c + (x * y) % 97) % 256).astype(np.uint8))
        plan = own.plan(MediaSize(1, height, width))
        views = own.cut(image, plan)
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
                table = embeddings.interpolate_pos_encoding(table, height, width)
            outputs[f"{name}_pos"] = table
            outputs[f"{name}_hidden_m2"] = encode_views(encoder, pixels, -2, "default", geometry_of(encoder.config))
    return Result(tensors=outputs)


def build_resampler(cls: type[Resampler], config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Resampler:
    """A resampler with the original's weights."""
    net = cls(
        vision_width=config["kv_dim"] or config["embed_dim"],
        hidden_size=config["embed_dim"],
        queries=config["grid_size"] ** 2,
        heads=config["num_heads"],
    ).eval()
    state = {name: tensor for name, tensor in weights.items() if name != "pos_embed"}
    state["proj.weight"] = state.pop("proj").T
    net.load_state_dict(state)
    return net


def perceiver_resampler(case: Case) -> Result:
    """Queries over whole views."""
    net = build_resampler(Resampler, case.config, case.weights())
    inputs, outputs = case.tensors, {}
    with torch.no_grad():
        for name, (rows, cols) in case.config["features"].items():
            mask = inputs.get(f"{name}_attn_mask")
            outputs[name] = net.resample(inputs[name], (1, rows, cols), None if mask is None else mask.bool())
            outputs[f"{name}_key_pos"] = net.key_positions(rows, cols)
    return Result(tensors=outputs)


def spatial_resampler(case: Case) -> Result:
    """Queries over their own regions."""
    net = build_resampler(SpatialResampler, case.config, case.weights())
    inputs, outputs, shapes = case.tensors, {}, {}
    with torch.no_grad():
        for name, (rows, cols) in case.config["features"].items():
            outputs[name] = net.resample(inputs[name], (1, rows, cols))
            shapes[name] = {"pool_hw": list(pool_shape(rows, cols))}
    return Result(json=shapes, tensors=outputs)


def pooling_size(case: Case) -> Result:
    """Points per region by grid."""
    return Result(json={"pool_hw": [list(pool_shape(rows, cols)) for rows, cols in case.inputs["grids_hw"]]})


class _Given(Planner):
    """Plans of views that a case hands over ready-made, looked up by a number that stands for the size."""

    def __init__(self, plans: Mapping[MediaSize, Plan]) -> None:
        self.plans = plans

    def plan(self, size: MediaSize) -> Plan:
        return self.plans[size]

    def cut(self, item: Any, plan: Plan) -> list[np.ndarray]:
        raise TypeError("the views of a golden case are given")


def _case_plan(overview: Tensor, slices: Tensor, marks: list[int], row_mark: int, size: MediaSize) -> Plan:
    """The plan that the given views and separators imply; rows end where the row separator stands."""
    views, row, col, cols = [], 0, 0, 0
    for mark in marks:
        views.append(View(slices.shape[-2], slices.shape[-1], role="tile", row=row, col=col))
        cols = max(cols, col + 1)
        row, col = (row + 1, 0) if mark == row_mark else (row, col + 1)
    views.append(View(overview.shape[-2], overview.shape[-1]))
    return Plan("image", size, tuple(views), rows=row, cols=cols)


def end_to_end(case: Case) -> Result:
    """Spliced embeddings, labels, mask, logits and loss of a mixed batch."""
    case.informational("config.resampler.embed_dim", "config.resampler.kv_dim", "config.n_images")
    inputs, config = case.tensors, case.config
    token = config["llama"]["vocab_size"]
    schema = {"column_separator": config["comma_id"], "row_separator": config["newline_id"]}
    queries = config["resampler"]["grid_size"] ** 2
    model = LlavakitForConditionalGeneration(
        LlavakitConfig(
            text_config={"model_type": "llama", **config["llama"]},
            vision_config={"model_type": "clip_vision_model", **config["clip"]},
            connector={
                "type": "spatial_resampler",
                "queries": queries,
                "heads": config["resampler"]["num_heads"],
            },
            media={"image": {"views": {"type": "native_slices"}, "arrange": {"type": "spatial_schema", **schema}}},
            image_token_id=token,
            system="llava-uhd",
        )
    ).eval()
    rename = rename_with(Released().renames_in())
    state = {rename(n): t for n, t in case.weights().items() if not n.endswith("mm_projector.pos_embed")}
    state["model.multi_modal_projector.proj.weight"] = state.pop("model.multi_modal_projector.proj").T
    model.load_state_dict(state)

    marks = case.inputs["ind_tokens"]
    sizes = [MediaSize(1, number + 1, 1) for number in range(len(marks))]
    plans = {
        size: _case_plan(inputs[f"image{n}"], inputs[f"patches{n}"], marks[n], config["newline_id"], size)
        for n, size in enumerate(sizes)
    }
    route = model.model.media.routes["image"]
    object.__setattr__(route, "planner", _Given(plans))

    rows, labels, used = [], [], []
    remaining = iter(range(len(marks)))
    for ids, mask, targets in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        keep = mask.bool()
        own = ids[keep].tolist()
        media = [next(remaining) for _ in range(own.count(PLACEHOLDER))]
        if not media:
            next(remaining, None)  # a text-only sample comes with one unused image
        layouts: list[list[Run]] = [route.layout(plans[sizes[n]]) for n in media]
        spliced = expand(own, targets[keep].tolist(), layouts, placeholder=PLACEHOLDER, image_token_id=token)
        rows.append(torch.tensor(spliced.ids))
        labels.append(torch.tensor(spliced.labels))
        used += media
    views = [view for n in used for view in (*inputs[f"patches{n}"][: len(marks[n])], inputs[f"image{n}"])]
    media = {"pixel_values": views, "visual_sizes": torch.tensor([sizes[n] for n in used])} if used else {}
    limit, side = config.get("tokenizer_model_max_length"), config.get("padding_side", "right")
    with torch.no_grad():
        spliced_rows, _, _ = model.model.embed(padded(rows, 0), **media)
        # rows are cut after media were laid out, perhaps in the middle of one
        cut = [row[: len(ids)][:limit] for row, ids in zip(spliced_rows, rows, strict=True)]
        embeds, targets = padded(cut, 0, side), padded([row[:limit] for row in labels], IGNORE, side)
        mask = padded([torch.ones(len(row), dtype=torch.long) for row in cut], 0, side)
        out = model(inputs_embeds=embeds, attention_mask=mask, labels=targets)
    tensors = {
        "inputs_embeds": embeds,
        "new_labels": targets,
        "new_attention_mask": mask,
        "logits": out.logits,
        "loss": out.loss.reshape(1),
    }
    return Result(tensors=tensors, mask={"logits": mask.bool().unsqueeze(-1)})


def padded(rows: Sequence[Tensor], fill: float, side: str = "right") -> Tensor:
    """Rows of one length."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill, padding_side=side)


def prompts(case: Case) -> Result:
    """Conversation strings."""
    dialogs = []
    for dialog in case.inputs["dialogs"]:
        template = get_template(dialog["template"])
        roles = ("user", "assistant")
        messages = [{"role": roles[who], "content": text} for who, text in dialog["messages"] if text is not None]
        opened = dialog["messages"][-1][1] is None
        prompt, _ = template.render(_placed(messages), add_generation_prompt=opened)
        dialogs.append({"prompt": prompt})
    shape = ("roles", "sep", "sep2", "system")
    ignored = {f"dialogs.*.{key}": "a field of the original's template object; the prompt shows it" for key in shape}
    return Result(json={"dialogs": dialogs}, ignored=ignored)


def _placed(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    from llavakit.conversation.messages import normalise, split_literals

    return normalise([{**m, "content": split_literals(m["content"])} for m in messages])


def metric_pope(case: Case) -> Result:
    """POPE's counts and rates."""
    inputs = case.inputs
    found = metrics.binary_metrics([processors.pope_answer(a) for a in inputs["answers"]], inputs["labels"])
    names = {"TP": "tp", "FP": "fp", "TN": "tn", "FN": "fn", "Accuracy": "accuracy", "Precision": "precision"}
    names |= {"Recall": "recall", "F1 score": "f1", "Yes ratio": "yes_ratio"}
    summary = [round(found[key], 3) for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")]
    return Result(json={**{name: found[key] for name, key in names.items()}, "summary": summary})


def metric_textvqa(case: Case) -> Result:
    """TextVQA's soft accuracy and normaliser."""
    inputs = case.inputs
    scores = [metrics.vqa_accuracy(row["pred_answer"], row["gt_answers"]) for row in inputs["pred_list"]]
    return Result(
        json={
            "accuracy": sum(scores) / len(scores),
            "normalised": [processors.vqa_answer(text) for text in inputs["strings"]],
        }
    )


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
