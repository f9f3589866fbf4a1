"""timm's vision transformers in golden cases: sizes and weights as timm has them, the model as llavakit reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llavakit.checkpoints.files import LazyState
from llavakit.checkpoints.opening import names_in_memory
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.entries import TINY, check_keys
from llavakit.vision.open_clip import read_open_clip

TOWER = "model.vision_tower."
SIZES = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"}
FIXED = {"num_classes", "init_values", "global_pool", "hidden_size", "num_patches", "published", "qkv_bias"}


def vit_options(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """timm's sizes as transformers' configuration."""
    own = check_keys(config, SIZES | FIXED, where)
    return {
        "model_type": "dinov2",
        "image_size": own["img_size"],
        "patch_size": own["patch_size"],
        "hidden_size": own["embed_dim"],
        "num_hidden_layers": own["depth"],
        "num_attention_heads": own["num_heads"],
        "mlp_ratio": int(own.get("mlp_ratio", 4)),
        "qkv_bias": own.get("qkv_bias", True),
        "layer_norm_eps": 1e-6,
    }


def published_vit(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LlavakitForConditionalGeneration:
    """A model around an encoder whose tensors are read as those of a published file."""
    options = vit_options(config, "config")
    whole = LlavakitConfig(
        text_config={"model_type": "llama", "vocab_size": 8, **TINY},
        vision_config=options,
        connector={"type": "mlp"},
        media={"image": {"views": {"type": "square", "size": options["image_size"]}}},
    )
    net = LlavakitForConditionalGeneration(whole).eval()
    found = read_open_clip(LazyState.of(dict(weights)), heads=options["num_attention_heads"])
    state = names_in_memory(net, found.state.renamed(lambda name: TOWER + name))
    net.model.vision_tower.load_state_dict({name.removeprefix(TOWER): state[name] for name in state})
    return net
