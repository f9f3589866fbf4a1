"""LLaVA-OneVision's golden components: encoder, connectors, arrangements, logits; views and data in their own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, SiglipVisionConfig

from llavakit.checkpoints.layouts import rename_with
from llavakit.connectors.base import Features
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import TINY, check_keys, fitting, greedy, loaded, published_model
from llavakit.proof.golden import Case, Example, Result, take
from llavakit.registry import ARRANGEMENTS, CONNECTORS, PLANNERS
from llavakit.splice.tiles import pool
from llavakit.systems.llava_onevision import parity_data, parity_views
from llavakit.systems.llava_onevision.checkpoint import (
    OnevisionLayout,
    connector_options,
    first_block,
    kept_tower,
    media_of,
    renumbered,
)
from llavakit.views.plan import MediaSize
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of

# Parts


def siglip_tower(case: Case) -> Result:
    """Features before the last norm, and the normalised ones that nothing reads."""
    vision = check_keys(case.config["vision"], SiglipVisionConfig().to_dict(), "config.vision")
    config = LlavakitConfig(
        text_config={"model_type": "qwen2", "vocab_size": 8, **TINY},
        vision_config=kept_tower({"model_type": "siglip_vision_model", **vision}),
        vision_feature_layer=-1,
    )
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
    rename = rename_with(OnevisionLayout().renames_in())
    for name in case.config["types"]:
        options = connector_options(name)
        hidden = width if name == "identity" else case.config["hidden_size"]
        connector = CONNECTORS.build(options, vision_width=width, hidden_size=hidden)
        own = {}
        for key, tensor in case.weights().items():
            if key.startswith(f"{name}/"):
                ours = rename(f"model.mm_projector.{key.removeprefix(f'{name}/')}")
                own[renumbered(ours, -first_block(options)).removeprefix("model.multi_modal_projector.")] = tensor
        connector = loaded(connector, own)
        flat = Features(fitting(features, connector).flatten(0, 1), [(1, 1, tokens)] * batch, list(range(batch)))
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


def entries_of(request: Mapping[str, Any], views: Sequence[Sequence[Tensor]]) -> list[Entry]:
    """Entries of a request.

    Args:
        request: `image_sizes` as (width, height) and `modalities`.
        views: Pixels or features of every entry.
    """
    modalities = request.get("modalities") or ["image"] * len(views)
    entries = []
    for own, (width, height), modality in zip(views, request["image_sizes"], modalities, strict=True):
        kind = "video" if modality == "video" else "image" if len(own) > 1 else "multi_image"
        depth = len(own) if kind == "video" else 1
        entries.append(Entry(kind, MediaSize(depth, height, width), list(own)))
    return entries


def settings_of_case(settings: Mapping[str, Any], views: Sequence[int], size: int, **options: Any) -> dict[str, Any]:
    """`config.media` of a request.

    Args:
        views: Views of every entry; several without a tiling ratio are taken for a square of four by the original.
        options: See `media_of`.
    """
    media = media_of(settings, size, **options)
    if media["image"]["views"]["type"] != "anyres" and any(count > 1 for count in views):
        media["image"]["views"] = {"type": "anyres", "size": size, "pinpoints": [[2 * size, 2 * size]]}
    return media


def batch_of(
    model: LlavakitForConditionalGeneration,
    request: Mapping[str, Any],
    entries: Sequence[Entry],
    settings: Any,
    **options: Any,
) -> ClassicBatch:
    """The batch of a request; a row without a placeholder consumes one entry."""
    return ClassicBatch(
        model,
        request["input_ids"],
        {IMAGE_PLACEHOLDER: entries},
        attention_mask=request.get("attention_mask"),
        labels=request.get("labels"),
        max_length=settings.get("tokenizer_model_max_length"),
        padding_side=settings.get("tokenizer_padding_side") or "right",
        **options,
    )


def _given(batch: ClassicBatch, request: Mapping[str, Any]) -> dict[str, Any]:
    """Mask, positions and labels; the original gives back only what it was given."""
    positions = None
    if request.get("position_ids") is not None:
        positions = (batch.attention.cumsum(-1) - 1).clamp(min=0).mul(batch.attention).tolist()
    return {
        "attention_mask": None if request.get("attention_mask") is None else batch.attention.tolist(),
        "position_ids": positions,
        "labels": None if request.get("labels") is None else batch.targets.tolist(),
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


def coordinate_model(rows: Sequence[Sequence[int]], side: int, media: Mapping[str, Any]) -> Any:
    """A model whose embeddings, visual features and newline say what they are, [kind, coordinates]."""
    tokens = 1 + max(max(row) for row in rows)
    size = media["image"]["views"]["size"]
    config = LlavakitConfig(
        text_config={"model_type": "qwen2", "vocab_size": tokens, **TINY, "num_key_value_heads": 1},
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": size,
            "patch_size": size // side,
            **TINY,
            "vision_use_head": False,
        },
        connector=connector_options("identity"),
        media=dict(media),
        image_token_id=tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavakitForConditionalGeneration(config).eval()
    model.get_input_embeddings().weight.data = _marked(TEXT, torch.arange(tokens))
    if model.model.image_newline is not None:
        model.model.image_newline.data = _marked(NEWLINE)
    return model


def token_layout(case: Case) -> Iterator[Example]:
    """Where every visual token and newline goes, read off features that are coordinates."""
    case.informational("inputs.*.big", "inputs.*.note")
    for name, request in case.inputs.items():
        yield Example(name, partial(_coordinates_of, case, name, request), name, (name,))


def _coordinates_of(case: Case, name: str, request: Mapping[str, Any]) -> Result:
    settings = take(case.config["model_config"]) | take(request.get("model_config") or {})
    size, side = case.config["tower_image_size"], request.get("side", case.config["side"])
    stacked = isinstance(request["views"], dict)
    counts = [1] * request["views"]["stacked"] if stacked else request["views"]
    media = settings_of_case(settings, counts, size, single_newline=not stacked)
    features, first = [], 0
    for count in counts:
        features.append(_coordinates(first, max(count, 1), side))
        first += max(count, 1)
    model = coordinate_model(request["input_ids"], side, media)
    entries = entries_of(request, features)
    batch = batch_of(model, request, entries, settings, features=True)
    embeds = (batch.embeds() * batch.meaningful()).detach()
    facts = {"shape": embeds.shape, **_given(batch, request)}
    wanted = (case.wanted.json or {}).get(name) or {}
    return Result(json={key: value for key, value in facts.items() if key in wanted}, tensors={name: embeds})


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
    media = media_of({}, size)
    model = coordinate_model(request["input_ids"], side, media)
    embeds = batch_of(model, request, [Entry(vectors=vectors)], settings).embeds().detach()
    return Result(json={"shape": embeds.shape}, tensors={"inputs_embeds": embeds})


# The whole model


SETTINGS = ("mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_newline_position", "mm_tunable_parts")


def model_of(
    case: Case, settings: Mapping[str, Any], views: Sequence[int] = (), **options: Any
) -> LlavakitForConditionalGeneration:
    """The case's model, opened as a published checkpoint.

    Args:
        settings: config.json without the encoder.
        views, options: See `settings_of_case`.
    """
    vision = case.config["vision"]
    encoder = check_keys(vision, SiglipVisionConfig().to_dict(), "config.vision")

    def laid_out(config: LlavakitConfig) -> None:
        config.media = settings_of_case(settings, views, vision["image_size"], **options)

    return published_model(
        {"model_type": "llava_qwen", "mm_projector_type": "mlp2x_gelu", **settings},
        case.weights(),
        {"model_type": "siglip_vision_model", **encoder},
        known=SETTINGS,
        change=laid_out,
    )


class Run:
    """One example of `e2e_logits` on its model.

    Args:
        rounding: "int" unpads like the original, "hf" like transformers.
    """

    def __init__(self, case: Case, name: str, rounding: str) -> None:
        self.case, self.name, self.request = case, name, case.inputs[name]
        settings = take(case.config["model_config"]) | take(self.request.get("model_config") or {})
        given = [case.tensors[f"{name}/{image}"] for image in self.request["images"]]
        views = [tensor.reshape(-1, *tensor.shape[-3:]) for tensor in given]
        counts = [len(own) for own in views]
        single = not self.request.get("stacked")
        self.model = model_of(case, settings, counts, rounding=rounding, single_newline=single)
        self.batch = batch_of(self.model, self.request, entries_of(self.request, views), settings)

    def __call__(self) -> Result:
        """Logits, loss, gradients and greedy tokens."""
        request, batch = self.request, self.batch
        out = batch.forward()
        rows = [own[positions] for own, positions in zip(out.logits, request["keep"], strict=True)]
        logits = torch.stack(rows) if len({len(row) for row in rows}) == 1 else torch.cat(rows)
        facts = {"sequence_length": batch.ids.shape[1], **_given(batch, request)}
        tensors = {f"{self.name}/logits": logits.detach()}
        if request.get("generate"):
            facts["greedy_new_tokens"] = greedy(self.model, batch.samples, request["generate"])
        if out.loss is not None:
            facts["loss"] = out.loss.item()
        if request.get("grads"):
            out.loss.backward()
            rename = rename_with(OnevisionLayout().renames_out(self.model.config))
            gradients = {rename(key): parameter.grad for key, parameter in self.model.named_parameters()}
            facts["grad_norms"] = {key: None if g is None else float(g.norm()) for key, g in gradients.items()}
            named = {f"{self.name}/grad_{key.removeprefix('model.')}": g for key, g in gradients.items()}
            tensors |= {key: gradient for key, gradient in named.items() if gradient is not None}
        wanted = (self.case.wanted.json or {}).get(self.name) or {}
        return Result(json={key: value for key, value in facts.items() if key in wanted}, tensors=tensors)


def end_to_end(case: Case) -> Iterator[Example | Result]:
    """Logits, loss, gradients and greedy tokens, unpadded like the original and (`hf/`) like transformers."""
    for name in case.inputs:
        yield Example(name, lambda name=name: Run(case, name, "int")(), name, (f"{name}/*",))

    def as_transformers(name: str, wanted: Mapping[str, Any]) -> Result:
        found = Run(case, name, "hf")()
        tensors = {f"hf/{key}": tensor for key, tensor in found.tensors.items()}
        json = {key: value for key, value in found.json.items() if key in wanted}
        reason = "how far two other libraries are apart"
        return Result(json=json, tensors=tensors, ignored={f"hf.{name}.max_abs_diff_to_original": reason})

    for name, wanted in (case.wanted.json.get("hf") or {}).items():
        yield Example(f"hf/{name}", partial(as_transformers, name, wanted), f"hf.{name}", (f"hf/{name}/*",))


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
