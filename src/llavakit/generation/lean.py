"""One token per row through a Llama-shaped decoder, in fewer operations than the decoder's own forward pass.

A decoding step of a small model is made of hundreds of operations on a few numbers each, and the operations cost more
than the numbers. Here a layer is written out: norms in five operations instead of eight, queries and keys rotated
together, one write of keys and values, attention without a choice of its kind. Linear layers and the MLP are called as
the modules they are, so adapters and quantised layers inside them stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from llavakit.generation.cache import RowCache
from llavakit.language.layers import layer_kind

_LAYERS = {
    llama.LlamaModel: (llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaRMSNorm),
    mistral.MistralModel: (mistral.MistralDecoderLayer, mistral.MistralAttention, mistral.MistralRMSNorm),
    qwen2.Qwen2Model: (qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2RMSNorm),
}


class LeanDecoder:
    """A decoder's layers, one new token per row.

    Args:
        decoder: The base model without head, for which `fits` is true.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self._sliding = [layer_kind(layer) == "sliding_attention" for layer in decoder.layers]
        size = decoder.layers[0].self_attn.head_dim
        device = decoder.norm.weight.device
        self._signs = torch.ones(size, device=device)
        self._signs[: size // 2] = -1
        self._eps = torch.tensor(decoder.norm.variance_epsilon, device=device)

    @staticmethod
    def fits(decoder: nn.Module) -> bool:
        """Whether a decoder is built of the layers that are written out here, in float32, and nobody listens inside."""
        known = _LAYERS.get(type(decoder))
        if known is None or decoder.dtype != torch.float32:
            return False
        layer_class, attention, norm = known
        norms = [decoder.norm]
        for layer in decoder.layers:
            if type(layer) is not layer_class or type(layer.self_attn) is not attention:
                return False
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
        if any(type(one) is not norm or one.variance_epsilon != decoder.norm.variance_epsilon for one in norms):
            return False
        return not any(  # hooks, and forwards put in an instance (accelerate's placement)
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            for module in decoder.modules()
        )

    def __call__(self, embeds: Tensor, positions: Tensor, cache: RowCache) -> Tensor:
        """Hidden states [rows, hidden] behind the last norm.

        Args:
            embeds: [rows, 1, hidden].
            positions: [rows, 1].
            cache: Rows whose step has begun; takes the new keys and values.
        """
        cos, sin = self.decoder.rotary_emb(embeds, positions)
        sin = sin * self._signs
        masks = cache.mask, cache.window_mask
        hidden = embeds.squeeze(1)
        for number, (layer, sliding) in enumerate(zip(self.decoder.layers, self._sliding, strict=True)):
            attention = layer.self_attn
            read = self._norm(hidden, layer.input_layernorm)
            new = torch.cat([attention.q_proj(read), attention.k_proj(read), attention.v_proj(read)], -1)
            keys, values = cache.views[number]
            rows, heads, _, size = keys.shape
            new = new.view(rows, -1, size)
            rotated = new[:, : new.shape[1] - heads]  # queries and keys
            rotated = torch.addcmul(rotated * cos, rotated.roll(size // 2, -1), sin)
            queries, own_keys = rotated[:, :-heads], rotated[:, -heads:]
            cache.write(number, torch.cat([own_keys, new[:, -heads:]], 1))
            seen = F.scaled_dot_product_attention(
                # queries that share keys stand where a sequence would, so keys and values are read once
                queries.reshape(rows, heads, -1, size),
                keys,
                values,
                attn_mask=masks[sliding],
                scale=attention.scaling,
            )
            hidden = hidden + attention.o_proj(seen.reshape(rows, -1))
            hidden = hidden + layer.mlp(self._norm(hidden, layer.post_attention_layernorm))
        return self._norm(hidden, self.decoder.norm)

    def _norm(self, hidden: Tensor, norm: Any) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, length, length, value=1 / hidden.shape[-1]).rsqrt_()
        return (hidden * scale).mul_(norm.weight)
