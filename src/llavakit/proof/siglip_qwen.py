"""Golden components that the systems of `checkpoints.siglip_qwen` share: arrangements in the prompt, logits.

A system hands over its layout; its adapters are the methods of `SharedComponents`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import SiglipVisionConfig

from llavakit.checkpoints.classic import mlp_options
from llavakit.checkpoints.layouts import rename_with
from llavakit.checkpoints.siglip_qwen import SiglipQwenLayout
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import TINY, check_keys, greedy, published_model
from llavakit.proof.golden import Case, Example, Result, take
from llavakit.views.plan import MediaSize

# A request of the original as entries of a batch


def entries_of(
    request: Mapping[str, Any], views: Sequence[Sequence[Tensor]], size: int, stacked: bool = False
) -> list[Entry]:
    """Entries of a request.

    Args:
        stacked: Whether the views come as one tensor, of which the original takes every one for an image.
        request: `image_sizes` as (width, height), or None where no view is a tile of a known picture, and `modalities`,
            of which those that are left out are images.
        views: Pixels or features of every entry.
        size: Side of the encoder's input.
    """
    modalities = [*(request.get("modalities") or []), *["image"] * len(views)]
    sizes = request.get("image_sizes") or [(max(len(own) - 1, 1) * size, size) for own in views]
    entries = []
    for own, (width, height), modality in zip(views, sizes, modalities, strict=False):
        video = modality == "video" and not stacked
        kind = "video" if video else "image" if len(own) > 1 else "multi_image"
        depth = len(own) if kind == "video" else 1
        entries.append(Entry(kind, MediaSize(depth, height, width), list(own)))
    return entries


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


# Features that say what they are


TEXT, VISUAL, NEWLINE, FRAME_END = range(4)


def marked(kind: int, *values: Tensor | int) -> Tensor:
    """Vectors [..., 4] that say what they are: kind, then up to three coordinates."""
    columns = torch.broadcast_tensors(torch.tensor(float(kind)), *(torch.as_tensor(v).float() for v in values))
    stacked = torch.stack(columns, dim=-1)
    return torch.nn.functional.pad(stacked, (0, 4 - stacked.shape[-1]))


def coordinates(first: int, views: int, side: int) -> list[Tensor]:
    """Features of the views numbered from `first` on, [side * side, 4] each."""
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return [marked(VISUAL, first + view, row.flatten(), col.flatten()) for view in range(views)]


def coordinate_model(rows: Sequence[Sequence[int]], side: int, media: Mapping[str, Any]) -> Any:
    """A model whose embeddings, visual features and newline say what they are, [kind, coordinates]."""
    tokens = 1 + max(0, *(max(row, default=0) for row in rows))
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
        connector=mlp_options("identity"),
        media=dict(media),
        image_token_id=tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavakitForConditionalGeneration(config).eval()
    model.get_input_embeddings().weight.data = marked(TEXT, torch.arange(tokens))
    if model.model.image_newline is not None:
        both = torch.stack([marked(NEWLINE), marked(FRAME_END)])
        model.model.image_newline.data = both if model.model.image_newline.dim() == 2 else both[0]
    return model


class SharedComponents:
    """Adapters of `token_layout` and `e2e_logits`.

    Args:
        layout: The system's published layout.
    """

    def __init__(self, layout: SiglipQwenLayout) -> None:
        self.layout = layout

    def media(self, settings: Mapping[str, Any], views: Sequence[int], size: int, **options: Any) -> dict[str, Any]:
        """`config.media` of a request.

        Args:
            views: Views of every entry; several without a tiling ratio are taken for a square of four by the original
                where it lays them out as a map.
            options: See `llavakit.checkpoints.siglip_qwen.media_of`.
        """
        media = self.layout.media(settings, size, **options)
        image = media["image"]
        if image["views"]["type"] != "anyres" and any(count > 1 for count in views):
            flat = image["arrange"]["type"] == "flat"
            rows = {count: [(count - 1) * size, size] for count in views if count > 1}
            pinpoints = list(rows.values()) if flat else [[2 * size, 2 * size]]
            image["views"] = {"type": "anyres", "size": size, "pinpoints": pinpoints}
        return media

    # where every token goes

    def token_layout(self, case: Case) -> Iterator[Example]:
        """Where every visual token and newline goes, read off features that are coordinates."""
        case.informational("inputs.*.big", "inputs.*.note")
        for name, request in case.inputs.items():
            yield Example(name, partial(self._coordinates_of, case, name, request), name, (name,))

    def _coordinates_of(self, case: Case, name: str, request: Mapping[str, Any]) -> Result:
        settings = take(case.config["model_config"]) | take(request.get("model_config") or {})
        size, side = case.config["tower_image_size"], request.get("side", case.config["side"])
        stacked = isinstance(request["views"], dict)
        counts = [1] * request["views"]["stacked"] if stacked else request["views"]
        media = self.media(settings, counts, size, single_newline=not stacked)
        features, first = [], 0
        for count in counts:
            features.append(coordinates(first, max(count, 1), side))
            first += max(count, 1)
        model = coordinate_model(request["input_ids"], side, media)
        entries = entries_of(request, features, size, stacked)
        batch = batch_of(model, request, entries, settings, features=True)
        embeds = (batch.embeds() * batch.meaningful()).detach()
        facts = {"shape": embeds.shape, **_given(batch, request)}
        wanted = (case.wanted.json or {}).get(name) or {}
        return Result(json={key: value for key, value in facts.items() if key in wanted}, tensors={name: embeds})

    # the whole model

    def model(
        self, case: Case, settings: Mapping[str, Any], views: Sequence[int] = (), **options: Any
    ) -> LlavakitForConditionalGeneration:
        """The case's model, opened as a published checkpoint.

        Args:
            settings: config.json without the encoder.
            views, options: See `media`.
        """
        vision = case.config["vision"]
        encoder = check_keys(vision, SiglipVisionConfig().to_dict(), "config.vision")

        def laid_out(config: LlavakitConfig) -> None:
            config.media = self.media(settings, views, vision["image_size"], **options)

        return published_model(
            {"model_type": "llava_qwen", "mm_projector_type": "mlp2x_gelu", **settings},
            case.weights(),
            {"model_type": "siglip_vision_model", **encoder},
            change=laid_out,
        )

    def end_to_end(self, case: Case) -> Iterator[Example | Result]:
        """Logits, loss, gradients and greedy tokens, unpadded like the original and (`hf/`) like transformers."""
        for name in case.inputs:
            yield Example(name, lambda name=name: Run(self, case, name, "int")(), name, (f"{name}/*",))

        def as_transformers(name: str, wanted: Mapping[str, Any]) -> Result:
            found = Run(self, case, name, "hf")()
            tensors = {f"hf/{key}": tensor for key, tensor in found.tensors.items()}
            json = {key: value for key, value in found.json.items() if key in wanted}
            reason = "how far two other libraries are apart"
            return Result(json=json, tensors=tensors, ignored={f"hf.{name}.max_abs_diff_to_original": reason})

        for name, wanted in (case.wanted.json.get("hf") or {}).items():
            yield Example(f"hf/{name}", partial(as_transformers, name, wanted), f"hf.{name}", (f"hf/{name}/*",))


class Run:
    """One example of `e2e_logits` on its model.

    Args:
        rounding: "int" unpads like the original, "hf" like transformers.
    """

    def __init__(self, shared: SharedComponents, case: Case, name: str, rounding: str) -> None:
        self.shared, self.case, self.name, self.request = shared, case, name, case.inputs[name]
        settings = take(case.config["model_config"]) | take(self.request.get("model_config") or {})
        given = [case.tensors[f"{name}/{image}"] for image in self.request["images"]]
        views = [tensor.reshape(-1, *tensor.shape[-3:]) for tensor in given]
        counts = [len(own) for own in views]
        single = not self.request.get("stacked")
        self.model = shared.model(case, settings, counts, rounding=rounding, single_newline=single)
        entries = entries_of(self.request, views, case.config["vision"]["image_size"], not single)
        self.batch = batch_of(self.model, self.request, entries, settings)

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
            rename = rename_with(self.shared.layout.renames_out(self.model.config))
            gradients = {rename(key): parameter.grad for key, parameter in self.model.named_parameters()}
            facts["grad_norms"] = {key: None if g is None else float(g.norm()) for key, g in gradients.items()}
            named = {f"{self.name}/grad_{key.removeprefix('model.')}": g for key, g in gradients.items()}
            tensors |= {key: gradient for key, gradient in named.items() if gradient is not None}
        wanted = (self.case.wanted.json or {}).get(self.name) or {}
        return Result(json={key: value for key, value in facts.items() if key in wanted}, tensors=tensors)
