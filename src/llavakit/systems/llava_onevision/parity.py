"""LLaVA-OneVision's golden components: encoder, connectors, arrangements, logits; views and data in their own files."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModel, SiglipVisionConfig

from llavakit.checkpoints.layouts import rename_with
from llavakit.connectors.base import Features
from llavakit.model.configuration import LlavakitConfig
from llavakit.proof.classic_batch import Entry
from llavakit.proof.entries import TINY, check_keys, fitting, loaded
from llavakit.proof.golden import Case, Result
from llavakit.proof.siglip_qwen import (
    SharedComponents,
    batch_of,
    coordinate_model,
    coordinates,
)
from llavakit.registry import CONNECTORS
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
    features, outputs, output_width = case.tensors["features"], {}, case.config["hidden_size"]
    batch, tokens, width = features.shape
    rename = rename_with(OnevisionLayout().renames_in())
    for name in case.config["types"]:
        options = connector_options(name)
        hidden = width if name == "identity" else output_width
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


def faster_video(case: Case) -> Result:
    """Detailed and coarse frames with a newline after every row and a mark after every frame."""
    case.informational("config.model_config.*")
    settings, request, side = case.config["model_config"], case.inputs, case.config["side"]
    frames, size = request["frames"], case.config["tower_image_size"]
    media = media_of({}, size)
    pool = {"mode": settings.get("mm_spatial_pool_mode") or "bilinear", "stride": 2}
    every = settings.get("faster_token_stride") or 10
    media["video"]["arrange"] = {"type": "faster_video", "every": every, "pool": pool}
    model = coordinate_model(request["input_ids"], side, media)
    video = Entry("video", MediaSize(frames, size, size), coordinates(0, frames, side))
    embeds = batch_of(model, request, [video], settings, features=True).embeds().detach()
    return Result(json={"shape": embeds.shape}, tensors={"inputs_embeds": embeds})


SHARED = SharedComponents(OnevisionLayout())

ADAPTERS = {
    "siglip_tower": siglip_tower,
    "projector": projector,
    "pool2d": pool2d,
    "token_layout": SHARED.token_layout,
    "faster_video": faster_video,
    "e2e_logits": SHARED.end_to_end,
    **parity_views.ADAPTERS,
    **parity_data.ADAPTERS,
}
