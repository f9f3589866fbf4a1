"""Modality pre-fusion: a few decoder blocks in which the text reads all vision tokens before these are thrown away.

The blocks are transformers' own decoder layers of the language model's family. They see
[vision | compressed | text] with causal attention, so that nothing of the vision part depends on the text:
`read_vision` runs it once per image, `read_text` once per question against the keys and values that it left. With
gradients `forward` runs both in one pass, since gradient checkpointing knows no cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from llavakit.errors import UserError
from llavakit.language.layers import run_layers

States = list[tuple[Tensor, Tensor]]  # per block keys and values, [images, kv heads, tokens, head size] each


def block_config(text_config: Any, layers: int) -> Any:
    """The language model's configuration for `layers` blocks with full attention and next to no vocabulary."""
    options = {**text_config.to_dict(), "num_hidden_layers": layers, "vocab_size": 8}
    options |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    plain = {"sliding_window": None, "use_sliding_window": False}
    options |= {name: value for name, value in plain.items() if name in options}
    options.pop("layer_types", None)
    config = type(text_config)(**options)
    eager = getattr(text_config, "_attn_implementation", None) == "eager"
    config._attn_implementation = "eager" if eager else "sdpa"  # others take no mask with holes
    return config


class Prefusion(nn.Module):
    """Blocks with rotary positions that skip hidden text.

    Args:
        text_config: Configuration of the language model; its family must have rotary decoder layers.
        layers: Number of blocks; with 0 everything passes unchanged.

    Raises:
        UserError: If the family is of another kind.
    """

    def __init__(self, text_config: Any, layers: int) -> None:
        super().__init__()
        config = block_config(text_config, max(layers, 1))
        with torch.device("meta"):
            family = AutoModel.from_config(config)
        if not hasattr(family, "layers") or not hasattr(family, "rotary_emb"):
            raise UserError(
                f"pre-fusion needs decoder layers with rotary positions (llama, mistral, qwen2, ...); "
                f"{config.model_type!r} has others"
            )
        self.config = config
        self.layers = nn.ModuleList(type(family.layers[0])(config, number) for number in range(layers))
        self.rotary_emb = type(family.rotary_emb)(config=config)

    def forward(self, vision: Tensor, text: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts in one pass.

        Args:
            vision: All vision tokens and the compressed ones [batch, tokens, hidden].
            text: Text embeddings [batch, length, hidden].
            visible: Text positions that other positions may see [batch, length].

        Returns:
            Both parts behind the last block; text positions that are not visible are meaningless.
        """
        seen = torch.cat([visible.new_ones(vision.shape[:2]), visible], dim=1)
        hidden = torch.cat([vision, text], dim=1)
        hidden = self._run(hidden, compacted(seen), causal_mask(seen, seen.shape[1], hidden.dtype))
        return hidden.split([vision.shape[1], text.shape[1]], dim=1)

    def read_vision(self, vision: Tensor) -> tuple[Tensor, States]:
        """The vision part alone, and the keys and values that text will read."""
        seen = torch.ones(1, vision.shape[1], dtype=torch.bool, device=vision.device)
        eager = self.config._attn_implementation == "eager"
        mask = causal_mask(seen, seen.shape[1], vision.dtype) if eager else None
        cache = DynamicCache()
        hidden = self._run(vision, compacted(seen), mask, cache)
        return hidden, [(layer.keys, layer.values) for layer in cache.layers]

    def read_text(self, states: States, text: Tensor, visible: Tensor) -> Tensor:
        """The text part against the vision part's keys and values; arguments and result as in `forward`."""
        if not self.layers or not text.shape[1]:
            return text
        cache = DynamicCache()
        for keys, values in states:
            layer = DynamicLayer()
            layer.update(keys, values)
            cache.layers.append(layer)
        seen = torch.cat([visible.new_ones(len(text), states[0][0].shape[2]), visible], dim=1)
        length = text.shape[1]
        return self._run(text, compacted(seen)[:, -length:], causal_mask(seen, length, text.dtype), cache)

    def _run(self, hidden: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache | None = None) -> Tensor:
        return run_layers(self.layers, hidden, self.rotary_emb, positions, attention_mask=mask, cache=cache)

    def state_bytes(self, tokens: int, itemsize: int) -> int:
        """Size of the keys and values of a number of vision tokens."""
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * len(self.layers) * heads * size * tokens * itemsize


def compacted(seen: Tensor) -> Tensor:
    """Positions that count visible tokens only [batch, length]; hidden ones get 1, what they give is not used."""
    return (seen.long().cumsum(-1) - 1).masked_fill(~seen, 1)


def causal_mask(seen: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [batch, 1, queries, length]: visible keys up to the query's own place.

    Args:
        seen: Visible positions [batch, length].
        queries: Number of last positions that are queries.
    """
    length = seen.shape[1]
    before = torch.ones(queries, length, dtype=torch.bool, device=seen.device).tril(length - queries)
    open_ = seen[:, None, None, :] & before
    return torch.zeros(open_.shape, dtype=dtype, device=seen.device).masked_fill(~open_, torch.finfo(dtype).min)
