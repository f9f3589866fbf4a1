"""The same recipe with tiny dimensions, for phantom data and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llavakit.errors import RecipeError
from llavakit.training.recipe import Recipe


def scale(
    recipe: Recipe,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocab: int | None = None,
    vision_hidden: int = 48,
    vision_layers: int = 3,
    image_size: int | None = None,
    patch_size: int | None = None,
    stages: Mapping[str, Any] | None = None,
) -> Recipe:
    """The same recipe with tiny dimensions, for phantom data: parts, their kinds and the stages stay.

    Widths, depths and sizes are replaced; sizes of views keep their ratio to the encoder's image size, connectors get
    as many attention heads as the encoders. Weights start at random, precision is float32, memory savers are off.

    Args:
        hidden, layers, heads: Language model; its MLP is four times as wide.
        vocab: Vocabulary; None keeps the recipe's.
        vision_hidden, vision_layers: All encoders.
        image_size, patch_size: All encoders; default: 4 pixels a patch, 4 patches a side.
        stages: Keys that every stage gets on top, for instance `{"max_steps": 5, "batch_size": 2}`.

    Raises:
        RecipeError: If the recipe starts from a checkpoint.
    """
    if recipe.parts is None:
        raise RecipeError("scale: the recipe starts from a checkpoint, whose dimensions are fixed")
    raw = recipe.model_dump()
    parts = raw["parts"]
    parts["init"], parts["tokenizer"] = {}, None
    text = dict(parts["text_config"] or {})
    tiny = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    tiny |= {"intermediate_size": 4 * hidden, "n_embd": hidden, "n_layer": layers, "n_head": heads}
    groups = max(text.get("num_attention_heads", 1) // max(text.get("num_key_value_heads", 0) or 1, 1), 1)
    if text.get("num_key_value_heads"):
        tiny["num_key_value_heads"] = max(heads // groups, 1)
    gpt2 = text.get("model_type") == "gpt2"
    parts["text_config"] = {
        key: value for key, value in text.items() if key not in ("head_dim", "layer_types", "max_window_layers")
    } | {key: value for key, value in tiny.items() if key.startswith("n_") == gpt2}
    if vocab is not None:
        parts["text_config"]["vocab_size"] = vocab
        parts["image_token_id"] = None
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # ids of another vocabulary
            parts["text_config"].pop(name, None)
    old_size = (parts["vision_config"] or {}).get("image_size", 224)
    patch = patch_size or 4
    size = image_size or 4 * patch

    old_patch = (parts["vision_config"] or {}).get("patch_size", 14)
    detail = size / old_size  # of views for a second encoder

    def tiny_tower(config: dict[str, Any]) -> dict[str, Any]:
        if "depths" in config:
            stages = len(config["depths"])
            own = {"depths": [1] * stages, "patch_size": 1}
            return config | own | {"hidden_sizes": [vision_hidden // 2 ** (stages - n - 1) for n in range(stages)]}
        own = {"hidden_size": vision_hidden, "num_hidden_layers": vision_layers, "num_attention_heads": heads}
        own |= {"image_size": size, "patch_size": patch}
        own |= {"mlp_ratio": 2} if "mlp_ratio" in config else {"intermediate_size": 2 * vision_hidden}
        return config | own

    parts["vision_config"] = tiny_tower(dict(parts["vision_config"] or {}))
    for encoder in (parts["extra_encoders"] or {}).values():
        if "depths" in encoder["config"]:  # its features stay on the grid of the main encoder's
            detail *= (old_patch / patch) / encoder["config"].get("patch_size", 4)
        encoder["config"] = tiny_tower(dict(encoder["config"]))
    for connector in (parts["connector"] or {}, *(parts["extra_connectors"] or {}).values()):
        connector |= {key: heads for key in connector if key in ("heads", "compressor_heads")}
    parts["media"] = _shrunk(parts["media"], size / old_size, patch, detail)
    for stage in raw["stages"]:
        stage["media"] = _shrunk(stage["media"], size / old_size, patch, detail)
        stage |= {"bf16": False, "dtype": "float32", "gradient_checkpointing": False, "global_batch": None}
        stage |= dict(stages or {})
    return Recipe.model_validate(raw)


def _shrunk(value: Any, ratio: float, patch: int, detail: float) -> Any:
    """Pixel sizes in a media section times `ratio`; planners that count patches get the new one.

    A planner with a `low_size` for the main encoder has a `size` for the second, which is taken times `detail`.
    """
    if not isinstance(value, dict):
        return value
    ratios = dict.fromkeys(("size", "low_size", "pinpoints", "crop", "resize", "nearest", "long_side"), ratio)
    if "low_size" in value:
        ratios["size"] = detail
    shrunk = {
        key: _times(item, ratios[key]) if key in ratios else _shrunk(item, ratio, patch, detail)
        for key, item in value.items()
    }
    return shrunk | ({"patch": patch} if "patch" in value else {})


def _times(value: Any, ratio: float) -> Any:
    if isinstance(value, list):
        return [_times(item, ratio) for item in value]
    return round(value * ratio) if isinstance(value, (int, float)) else value
