"""One token per row through a Llama-shaped decoder, in fewer operations than the decoder's own forward pass.

A decoding step of a small model is made of hundreds of operations on a few numbers each, and the operations cost more
than the numbers. Here a layer is written out: norms in five operations instead of eight, queries and keys rotated
together, one write of keys and values, attention without a choice of its kind. Plain linear layers multiply few rows in
the order of factors that is fast for them (`product`); all others, adapted and quantised ones, are called as the
modules they are.
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
from llavakit.language.head import Head, finished
from llavakit.language.layers import layer_kind

_FEW_ROWS = 8  # up to so many the order of factors matters to a product on a CPU

_LAYERS = {
    llama.LlamaModel: (llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaRMSNorm),
    mistral.MistralModel: (mistral.MistralDecoderLayer, mistral.MistralAttention, mistral.MistralRMSNorm),
    qwen2.Qwen2Model: (qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2RMSNorm),
}
_MLPS = (llama.LlamaMLP, mistral.MistralMLP, qwen2.Qwen2MLP)


def product(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A linear layer's output [rows, out], whose columns may lie one behind the other.

    BLAS libraries multiply two to eight rows up to twice as fast where the weights come first: tuned for tall left
    factors, they otherwise fill vectors with what are few columns.

    Args:
        layer: Any module from [rows, in] to [rows, out]; a plain linear layer and the output layer are written out.
        hidden: [rows, in]
    """
    written_out = type(layer) in (nn.Linear, Head) and type(layer.weight) is nn.Parameter
    if not (1 < len(hidden) <= _FEW_ROWS and hidden.device.type == "cpu" and written_out) or layer._forward_hooks:
        return layer(hidden)
    columns = hidden.contiguous().t()
    if layer.bias is None:
        found = torch.mm(layer.weight, columns).t()
    else:
        found = torch.addmm(layer.bias[:, None], layer.weight, columns).t()
    return finished(found, layer.scale, layer.cap) if type(layer) is Head else found


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
        hidden = embeds.squeeze(1)
        cos, sin = self.decoder.rotary_emb(embeds, positions)
        sin = sin * self._signs
        masks, attend = (cache.mask, cache.window_mask), _attend_fused
        if hidden.device.type == "cpu":
            attend = _attend
            masks = [None if kind not in self._sliding else cache.mask_of_heads(kind) for kind in (False, True)]
        for number, (layer, sliding) in enumerate(zip(self.decoder.layers, self._sliding, strict=True)):
            attention = layer.self_attn
            read = self._norm(hidden, layer.input_layernorm)
            new = torch.cat([product(one, read) for one in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
            keys, values = cache.views[number]
            rows, heads, _, size = keys.shape
            new = new.view(rows, -1, size)
            rotated = new[:, : new.shape[1] - heads]  # queries and keys
            rotated = torch.addcmul(rotated * cos, rotated.roll(size // 2, -1), sin)
            queries, own_keys = rotated[:, :-heads], rotated[:, -heads:]
            cache.write(number, torch.cat([own_keys, new[:, -heads:]], 1))
            # queries that share keys stand where a sequence would, so keys and values are read once
            seen = attend(queries.reshape(rows, heads, -1, size), keys, values, masks[sliding], attention.scaling)
            hidden = hidden + product(attention.o_proj, seen.reshape(rows, -1))
            hidden = hidden + self._mlp(layer.mlp, self._norm(hidden, layer.post_attention_layernorm))
        return self._norm(hidden, self.decoder.norm)

    @staticmethod
    def _mlp(mlp: nn.Module, read: Tensor) -> Tensor:
        if type(mlp) not in _MLPS:
            return mlp(read)
        return product(mlp.down_proj, mlp.act_fn(product(mlp.gate_proj, read)) * product(mlp.up_proj, read))

    def _norm(self, hidden: Tensor, norm: Any) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, length, length, value=1 / hidden.shape[-1]).rsqrt_()
        return (hidden * scale).mul_(norm.weight)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one position in two products: fused kernels gain by blocks of many positions.

    Args:
        queries: [rows, kv heads, queries that share a kv head, size]
        keys, values: [rows, kv heads, width, size]
        mask: Additive [rows * kv heads, 1, width].

    Returns:
        [rows * kv heads, queries, size]
    """
    scores = torch.baddbmm(mask, queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1))


def _attend_fused(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
