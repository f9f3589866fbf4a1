"""Tiny models and prompts that the tests share."""

from __future__ import annotations

from typing import Any

import torch

from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.views.plan import MediaSize

SIZE = 32
VOCAB = 96
TOKEN = 95

ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
    },
    "siglip": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
        "vision_use_head": False,
    },
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 16,
        "mlp_ratio": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
    },
    "convnext": {
        "model_type": "convnext",
        "hidden_sizes": [8, 8, 16],
        "depths": [1, 1, 1],
        "num_stages": 3,
        "patch_size": 2,
        "image_size": SIZE,
    },
}

CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"type": "mlp", "depth": 1},
    "mlp": {"type": "mlp", "depth": 2},
    "pooling": {"type": "pooling", "stride": 2},
    "resampler": {"type": "resampler", "queries": 4, "heads": 2},
}

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_LLAMA, "head_dim": 8, "sliding_window": None},
    "phi": {"model_type": "phi", **_LLAMA, "num_key_value_heads": 4},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def config(
    encoder: str = "clip", connector: str | dict[str, Any] = "mlp", decoder: str = "llama", **fields: Any
) -> LlavakitConfig:
    """A configuration of tiny parts by their names above."""
    views = {"type": "squash", "size": SIZE}
    defaults: dict[str, Any] = {
        "text_config": dict(DECODERS[decoder]),
        "vision_config": dict(ENCODERS[encoder]),
        "connector": dict(CONNECTORS[connector] if isinstance(connector, str) else connector),
        "vision_feature_layer": -1 if encoder == "convnext" else -2,
        "image_token_id": TOKEN,
        "media": {"image": {"views": views, "arrange": {"type": "flat"}}},
    }
    return LlavakitConfig(**(defaults | fields))


def model(seed: int = 0, **parts: Any) -> LlavakitForConditionalGeneration:
    """A tiny model with random weights large enough that mistakes show in its logits."""
    torch.manual_seed(seed)
    net = LlavakitForConditionalGeneration(config(**parts)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return net


def prompt(net: LlavakitForConditionalGeneration, layout: str, seed: int = 0) -> dict[str, Any]:
    """A sample from a sketch: `t` is a text token, `I` an image.

    Returns:
        Batch of one: input_ids, attention_mask, labels, and with images pixel_values, visual_sizes, visual_modalities.
    """
    generator = torch.Generator().manual_seed(seed)
    size = MediaSize(1, SIZE, SIZE)
    count = net.model.media.count("image", size)
    ids: list[int] = []
    for letter in layout:
        if letter == "I":
            ids += [TOKEN] * count
        else:
            ids.append(int(torch.randint(3, TOKEN, (1,), generator=generator)))
    images = layout.count("I")
    input_ids = torch.tensor([ids])
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    batch["labels"] = input_ids.masked_fill(input_ids == TOKEN, -100)
    if images:
        batch["pixel_values"] = torch.randn(images, 3, SIZE, SIZE, generator=generator)
        batch["visual_sizes"] = torch.tensor([size] * images)
        batch["visual_modalities"] = torch.zeros(images, dtype=torch.long)
    return batch
