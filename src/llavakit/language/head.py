"""The output layer of a decoder: hidden states to logits, as its own family computes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

# Families that multiply their logits by a field of their configuration (1), or divide them by it (-1).
_SCALES = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), ("logit_scale", 1)),
    **dict.fromkeys(("granite", "granite_swa", "minicpm3"), ("logits_scaling", -1)),
    **dict.fromkeys(("granitemoe", "granitemoe_swa", "granitemoeshared", "granitemoehybrid"), ("logits_scaling", -1)),
    "hyperclovax": ("logits_scaling", 1),
    "falcon_h1": ("lm_head_multiplier", 1),
}


class Head(nn.Linear):
    """A linear layer whose logits are scaled and softly capped where the family does that (Cohere, Granite, Gemma).

    Attributes:
        scale: Factor of the logits.
        cap: Bound of their magnitude, cap x tanh(logits / cap), or None.
    """

    scale: float = 1.0
    cap: float | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocabulary]."""
        return finished(F.linear(hidden, self.weight, self.bias), self.scale, self.cap)

    @classmethod
    def of(cls, text_config: Any) -> Head:
        """The head of a decoder with this configuration, with random weights."""
        head = cls(text_config.hidden_size, text_config.vocab_size, bias=head_has_bias(text_config))
        head.scale, head.cap = scale_and_cap(text_config)
        return head

    def holding(self, layer: nn.Linear) -> Head:
        """A head like this one with the weights of a linear layer, which may have more rows."""
        with torch.device("meta"):
            head = Head(layer.in_features, layer.out_features, bias=layer.bias is not None)
        head.weight, head.bias, head.scale, head.cap = layer.weight, layer.bias, self.scale, self.cap
        return head


def finished(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """Logits scaled and softly capped."""
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def scale_and_cap(text_config: Any) -> tuple[float, float | None]:
    """What a family multiplies its logits by, and the bound of its soft capping or None."""
    field, power = _SCALES.get(text_config.model_type, ("", 1))
    scale = float(getattr(text_config, field, None) or 1.0) ** power
    return scale, getattr(text_config, "final_logit_softcapping", None)


def head_has_bias(text_config: Any) -> bool:
    """Whether this family's head has a bias, asked of a one-layer copy without memory."""
    small = type(text_config)(**{**text_config.to_dict(), "num_hidden_layers": 1, "layer_types": None})
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(small).get_output_embeddings()
    return getattr(head, "bias", None) is not None
