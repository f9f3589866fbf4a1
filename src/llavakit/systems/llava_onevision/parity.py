"""LLaVA-OneVision's golden components: encoder, connectors, arrangements, logits; views and data in their own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from llavakit.checkpoints.layouts import rename_with
from llavakit.connectors.base import Features
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MODALITIES
from llavakit.proof.golden import Case, Result
from llavakit.registry import ARRANGEMENTS, CONNECTORS, PLANNERS
from llavakit.splice.layout import Run
from llavakit.splice.scatter import IGNORE, expand, scatter
from llavakit.splice.tiles import pool
from llavakit.systems.llava_onevision import parity_data, parity_views
from llavakit.systems.llava_onevision.checkpoint import (
    Classic,
    connector_options,
    first_block,
    kept_tower,
    media_of,
    renumbered,
)
from llavakit.views.plan import MediaSize, Plan
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of

PLACEHOLDER = -200


# Parts


def siglip_tower(case: Case) -> Result:
    """Features before the last norm, and the normalised ones that nothing reads."""
    config = tiny_config({"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2}, case.config["vision"])
    encoder = AutoModel.from_config(config.vision_config).eval().requires_grad_(False)
    rename = rename_with(((r"^vision_tower\.(?:vision_model\.)?", ""),))
    state = {rename(name): tensor for name, tensor in case.weights().items()}
    inner = getattr(encoder, "vision_model", encoder)
    inner.load_state_dict({name: tensor for name, tensor in state.items() if name in inner.state_dict()})
    geometry = geometry_of(config.vision_config)
    pixels = case.tensors["pixel_values"]
    layers = config.vision_config.num_hidden_layers
    facts = {
        "num_layers_kept": layers,
        "hidden_states": layers + 1,
        "num_patches_per_side": config.vision_config.image_size // config.vision_config.patch_size,
        "requires_grad": [name for name, parameter in encoder.named_parameters() if parameter.requires_grad],
    }
    features = encode_views(encoder, pixels, config.vision_feature_layer, "full", geometry)
    return Result(
        json=facts, tensors={"features": features, "last_hidden_state_not_used": inner.post_layernorm(features)}
    )


def projector(case: Case) -> dict[str, Tensor]:
    """Every connector by its published name."""
    case.informational("config.mm_hidden_size")
    features, outputs = case.tensors["features"], {}
    batch, tokens, width = features.shape
    rename = rename_with(Classic().renames_in())
    for name in case.config["types"]:
        options = connector_options(name)
        hidden = width if name == "identity" else case.config["hidden_size"]
        connector = CONNECTORS.build(options, vision_width=width, hidden_size=hidden)
        own = {}
        for key, tensor in case.weights().items():
            if key.startswith(f"{name}/"):
                ours = rename(f"model.mm_projector.{key.removeprefix(f'{name}/')}")
                own[renumbered(ours, -first_block(options)).removeprefix("model.multi_modal_projector.")] = tensor
        connector.load_state_dict(own)
        flat = Features(features.flatten(0, 1), [(1, 1, tokens)] * batch, list(range(batch)))
        with torch.no_grad():
            outputs[name] = connector(flat, []).values.unflatten(0, (batch, tokens))
    return outputs


def pool2d(case: Case) -> dict[str, Tensor]:
    """Pooled frames of every mode and stride."""
    side = case.config["side"]
    frames = case.tensors["features"].unflatten(1, (side, side))
    return {
        f"{mode}/{stride}": pool(frames, mode, 2 if stride is None else stride).flatten(1, 2)
        for mode in case.config["modes"]
        for stride in case.config["strides"]
    }


# Splicing


@dataclass
class Entry:
    """One entry of the original's list of images: its kind, plan and number of views."""

    kind: str
    plan: Plan
    views: int


def entries_of(media: Mapping[str, Any], request: Mapping[str, Any], views: Sequence[int], size: int) -> list[Entry]:
    """Entries of a request.

    Args:
        media: See `media_of`.
        request: `image_sizes` as (width, height) and `modalities`.
        views: Views of every entry; 0 stands for one that came without a list.
        size: Side of the encoder's input.
    """
    entries = []
    modalities = request.get("modalities") or ["image"] * len(views)
    for count, (width, height), modality in zip(views, request["image_sizes"], modalities, strict=True):
        kind = modality if modality == "video" else "image" if count > 1 else "multi_image"
        options = media[kind]["views"]
        if kind == "image" and options["type"] != "anyres":  # tiles without anyres are taken for a square of four
            options = {"type": "anyres", "size": size, "pinpoints": [[2 * size, 2 * size]]}
        depth = count if kind == "video" else 1
        entries.append(Entry(kind, PLANNERS.build(options).plan(MediaSize(depth, height, width)), max(count, 1)))
    return entries


@dataclass
class Spliced:
    """A padded batch with placeholders expanded.

    Attributes:
        ids, mask, labels, positions: [rows, longest].
        entries: Numbers of the entries that stand in a row, in order; others were only consumed.
        kept: How many of their visual tokens truncation left.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    positions: Tensor
    entries: list[int]
    kept: list[int]


def splice(
    request: Mapping[str, Any], counts: Sequence[int], token: int, side: str = "right", max_length: int | None = None
) -> Spliced:
    """Classic ids to expanded ones; a row without a placeholder consumes one entry.

    Args:
        request: `input_ids`, and `attention_mask` and `labels` if there are any.
        counts: Visual tokens of every entry.
        token: Id to write at visual positions.
        side: Where rows are padded.
    """
    rows, targets, used, kept = [], [], [], []
    place = 0
    for number, row in enumerate(request["input_ids"]):
        visible = request["attention_mask"][number] if request.get("attention_mask") else [1] * len(row)
        wanted = request["labels"][number] if request.get("labels") else [IGNORE] * len(row)
        ids = [i for i, seen in zip(row, visible, strict=True) if seen]
        labels = [label for label, seen in zip(wanted, visible, strict=True) if seen]
        images = ids.count(PLACEHOLDER)
        own = list(range(place, place + images))
        layouts = [[Run(visual=counts[entry])] for entry in own]
        expanded = expand(ids, labels, layouts, placeholder=PLACEHOLDER, image_token_id=token)
        rows.append(expanded.ids[:max_length])
        targets.append(expanded.labels[:max_length])
        left = rows[-1].count(token)
        for entry in own:
            used.append(entry)
            kept.append(min(left, counts[entry]))
            left -= kept[-1]
        place += max(images, 1)

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        longest = max(map(len, values))
        pads = [[fill] * (longest - len(row)) for row in values]
        return torch.tensor([p + list(r) if side == "left" else list(r) + p for r, p in zip(values, pads, strict=True)])

    return Spliced(
        ids=padded(rows, 0),
        mask=padded([[1] * len(row) for row in rows], 0),
        labels=padded(targets, IGNORE),
        positions=padded([range(len(row)) for row in rows], 0),
        entries=used,
        kept=kept,
    )


def _given(spliced: Spliced, request: Mapping[str, Any]) -> dict[str, Any]:
    """Mask, positions and labels; the original gives back only what it was given."""
    return {
        "attention_mask": spliced.mask.tolist() if request.get("attention_mask") else None,
        "position_ids": spliced.positions.tolist() if request.get("position_ids") else None,
        "labels": spliced.labels.tolist() if request.get("labels") else None,
    }


TEXT, VISUAL, NEWLINE, FRAME_END = range(4)


def _marked(kind: int, *values: Tensor | int) -> Tensor:
    """Vectors [..., 4] that say what they are: kind, then up to three coordinates."""
    columns = torch.broadcast_tensors(torch.tensor(float(kind)), *(torch.as_tensor(v).float() for v in values))
    stacked = torch.stack(columns, dim=-1)
    return torch.nn.functional.pad(stacked, (0, 4 - stacked.shape[-1]))


def _coordinates(first: int, views: int, side: int) -> list[Tensor]:
    """Features of the views numbered from `first` on, [side * side, 4] each."""
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return [_marked(VISUAL, first + view, row.flatten(), col.flatten()) for view in range(views)]


def token_layout(case: Case) -> Result:
    """Where every visual token and newline goes, read off features that are coordinates."""
    case.informational("inputs.*.big")
    facts, tensors = {}, {}
    for name, request in case.inputs.items():
        settings = case.config["model_config"] | request.get("model_config", {})
        size, side = case.config["tower_image_size"], request.get("side", case.config["side"])
        stacked = isinstance(request["views"], dict)
        views = [1] * request["views"]["stacked"] if stacked else request["views"]
        media = media_of(settings, size, single_newline=not stacked)
        entries = entries_of(media, request, views, size)
        vectors, first = [], 0
        for entry in entries:
            tokens = _coordinates(first, entry.views, side)
            first += entry.views
            arrangement = ARRANGEMENTS.build(media[entry.kind]["arrange"])
            vectors.append(arrangement.arrange(entry.plan, [(1, side, side)] * entry.views, tokens, _marked(NEWLINE)))
        found, tensors[name] = _laid_out(request, vectors, settings)
        facts[name] = {key: value for key, value in found.items() if key in case.wanted.json[name]}
    return Result(json=facts, tensors=tensors)


def _laid_out(
    request: Mapping[str, Any], vectors: Sequence[Tensor], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    token = 1 + max(max(row) for row in request["input_ids"])
    spliced = splice(
        request,
        [len(own) for own in vectors],
        token,
        settings.get("tokenizer_padding_side", "right"),
        settings.get("tokenizer_model_max_length"),
    )
    embeds = _marked(TEXT, spliced.ids) * spliced.mask.unsqueeze(-1)
    taken = [vectors[entry][:count] for entry, count in zip(spliced.entries, spliced.kept, strict=True)]
    if taken:
        embeds = scatter(embeds, spliced.ids == token, torch.cat(taken))
    return {"shape": embeds.shape, **_given(spliced, request)}, embeds


def faster_video(case: Case) -> Result:
    """Detailed and coarse frames with a newline after every row and a mark after every frame."""
    case.informational("config.model_config.*")
    settings, request, side = case.config["model_config"], case.inputs, case.config["side"]
    frames = request["frames"]
    arrangement = ARRANGEMENTS.build(
        {
            "type": "faster_video",
            "every": settings.get("faster_token_stride", 10),
            "pool": {"mode": settings.get("mm_spatial_pool_mode", "bilinear"), "stride": 2},
        }
    )
    size = case.config["tower_image_size"]
    plan = PLANNERS.build({"type": "frames", "frame": {"type": "squash", "size": size}}).plan(
        MediaSize(frames, size, size)
    )
    ends = torch.stack([_marked(NEWLINE), _marked(FRAME_END)])
    vectors = arrangement.arrange(plan, [(1, side, side)] * frames, _coordinates(0, frames, side), ends)
    facts, embeds = _laid_out(request, [vectors], settings)
    return Result(json={"shape": facts["shape"]}, tensors={"inputs_embeds": embeds})


# The whole model


def tiny_config(
    settings: Mapping[str, Any], vision: Mapping[str, Any], *, rounding: str = "int", stacked: bool = False
) -> LlavakitConfig:
    """The configuration of a case's model; the placeholder id lies outside the vocabulary."""
    return LlavakitConfig(
        text_config=Classic().text_config({"model_type": "llava_qwen", **settings}),
        vision_config=kept_tower({"model_type": "siglip_vision_model", **vision}),
        connector=connector_options(settings.get("mm_projector_type", "mlp2x_gelu")),
        media=media_of(settings, vision["image_size"], rounding=rounding, single_newline=not stacked),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_id=settings["vocab_size"],
        template="qwen_1_5",
        system="llava-onevision",
    )


def build(config: LlavakitConfig, weights: Mapping[str, Tensor]) -> LlavakitForConditionalGeneration:
    """A model with the original code's weights."""
    rename = rename_with(Classic().renames_in())
    model = LlavakitForConditionalGeneration(config).eval()
    own = set(model.state_dict())
    state = {rename(name): tensor for name, tensor in weights.items()}
    if "model.image_newline" not in own:
        state.pop("model.image_newline", None)
    missing, extra = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name not in (model._tied_weights_keys or {})]
    if missing or extra:
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unknown {extra[:3]}")
    model.tie_weights()
    return model


@dataclass
class Example:
    """One example of `e2e_logits` on its model."""

    model: LlavakitForConditionalGeneration
    request: Mapping[str, Any]
    entries: list[Entry]
    spliced: Spliced
    media: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, name: str, rounding: str) -> Example:
        """The example called `name` under a rule of rounding."""
        request, inputs = case.inputs[name], case.tensors
        settings = case.config["model_config"] | request.get("model_config", {})
        vision = case.config["vision"]
        stacked = bool(request.get("stacked"))
        model = build(tiny_config(settings, vision, rounding=rounding, stacked=stacked), case.weights())
        given = [inputs[f"{name}/{image}"] for image in request["images"]]
        views = [0 if tensor.dim() == 3 else len(tensor) for tensor in given]
        entries = entries_of(model.config.media, request, views, vision["image_size"])
        spec = model.model.media
        counts = [sum(run.visual for run in spec.layout(entry.kind, entry.plan.size)) for entry in entries]
        spliced = splice(
            request,
            counts,
            model.config.image_token_id,
            settings.get("tokenizer_padding_side", "right"),
            settings.get("tokenizer_model_max_length"),
        )
        used = [(given[entry].reshape(-1, *given[entry].shape[-3:]), entries[entry]) for entry in spliced.entries]
        media = {}
        if used:
            media = {
                "pixel_values": torch.cat([pixels for pixels, _ in used]),
                "visual_sizes": torch.tensor([entry.plan.size for _, entry in used]),
                "visual_modalities": torch.tensor([MODALITIES.index(entry.kind) for _, entry in used]),
            }
        return cls(model, request, entries, spliced, media)

    def forward(self) -> Any:
        """The model's output on the whole batch."""
        labels = self.spliced.labels if self.request.get("labels") else None
        return self.model(input_ids=self.spliced.ids, attention_mask=self.spliced.mask, labels=labels, **self.media)

    def kept(self, logits: Tensor) -> Tensor:
        """Logits of the text positions, stacked if all rows have as many, else one after another."""
        rows = [own[positions] for own, positions in zip(logits, self.request["keep"], strict=True)]
        return torch.stack(rows) if len({len(row) for row in rows}) == 1 else torch.cat(rows)

    def greedy(self) -> list[list[int]]:
        """New tokens of greedy decoding."""
        ids = self.spliced.ids
        out = self.model.generate(
            input_ids=ids,
            attention_mask=self.spliced.mask,
            max_new_tokens=self.request["generate"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **self.media,
        )
        return out[:, ids.shape[1] :].tolist()

    def gradients(self, loss: Tensor) -> dict[str, Tensor | None]:
        """Gradients of the loss by the original names of parameters."""
        loss.backward()
        rename = rename_with(Classic().renames_out(self.model.config))
        return {rename(name): parameter.grad for name, parameter in self.model.named_parameters()}


def end_to_end(case: Case) -> Result:
    """Logits, loss, gradients and greedy tokens, unpadded like the original and (`hf/`) like transformers."""
    facts: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    own = [name for name in case.wanted.json if name != "hf"]
    for name in own:
        example = Example.of(case, name, "int")
        out = example.forward()
        tensors[f"{name}/logits"] = example.kept(out.logits).detach()
        facts[name] = {"sequence_length": example.spliced.ids.shape[1]}
        given = _given(example.spliced, example.request)
        facts[name] |= {key: value for key, value in given.items() if key in case.wanted.json[name]}
        if example.request.get("generate"):
            facts[name]["greedy_new_tokens"] = example.greedy()
        if out.loss is not None:
            facts[name]["loss"] = out.loss.item()
        if example.request.get("grads"):
            gradients = example.gradients(out.loss)
            facts[name]["grad_norms"] = {
                key: None if gradient is None else float(gradient.norm()) for key, gradient in gradients.items()
            }
            tensors |= {f"{name}/grad_{key.removeprefix('model.')}": g for key, g in gradients.items() if g is not None}
    facts["hf"] = {}
    for name in case.wanted.json.get("hf", {}):
        example = Example.of(case, name, "hf")
        with torch.no_grad():
            out = example.forward()
        tensors[f"hf/{name}/logits"] = logits = example.kept(out.logits)
        original = tensors[f"{name}/logits"]
        facts["hf"][name] = {
            "sequence_length": example.spliced.ids.shape[1],
            "max_abs_diff_to_original": float((logits - original).abs().max()),
        }
        if example.request.get("generate"):
            facts["hf"][name]["greedy_new_tokens"] = example.greedy()
        if out.loss is not None:
            facts["hf"][name]["loss"] = out.loss.item()
    return Result(json=facts, tensors={name: tensor for name, tensor in tensors.items() if name in case.wanted.tensors})


ADAPTERS = {
    "siglip_tower": siglip_tower,
    "projector": projector,
    "pool2d": pool2d,
    "token_layout": token_layout,
    "faster_video": faster_video,
    "e2e_logits": end_to_end,
    **parity_views.ADAPTERS,
    **parity_data.ADAPTERS,
}
