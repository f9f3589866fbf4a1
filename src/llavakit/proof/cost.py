"""Cost of published models at their true dimensions, counted without weights.

Networks are built on the meta device and PyTorch's own counter counts. Convention: 2 FLOPs per multiply-add of
matrix products and convolutions, batch 1, the full square of attention (no causal halving). `linear` are the
products with weights, `attention` those between activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llavakit.registry import ARRANGEMENTS, PLANNERS
from llavakit.views.plan import MediaSize
from llavakit.vision.encode import hidden_states

_ATTENTION_OPS = ("bmm", "baddbmm", "_scaled_dot_product")


@dataclass(frozen=True)
class Flops:
    """FLOPs by kind."""

    linear: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """Both kinds together."""
        return self.linear + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.linear * times, self.attention * times)


def count(run: Callable[[], Any]) -> Flops:
    """FLOPs of what `run` does (on meta tensors it costs nothing).

    Angles of rotary positions are left out: some releases of transformers write them as a matrix product, others not.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    linear = attention = 0
    for module, counts in counter.get_flop_counts().items():
        rotary = module.endswith((".rotary_emb", "RotaryEmbedding"))
        if not rotary and module != "Global":
            continue
        for op, flops in counts.items():
            flops = -flops if rotary else flops
            if any(word in str(op) for word in _ATTENTION_OPS):
                attention += flops
            else:
                linear += flops
    return Flops(linear, attention)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A module without memory."""
    with torch.device("meta"):
        return make().eval()


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def vision_model(config: Any) -> nn.Module:
    """An encoder on the meta device whose attention the counter sees."""
    from transformers import AutoModel

    return on_meta(lambda: AutoModel.from_config(config, attn_implementation="eager"))


def vision_flops(config: Any, height: int | None = None, width: int | None = None, layer: int = -1) -> Flops:
    """FLOPs of an encoder on one view up to the hidden state `layer` (-1: all layers)."""
    height, width = height or config.image_size, width or config.image_size
    pixels = torch.empty(1, getattr(config, "num_channels", 3), height, width, device="meta")
    encoder = vision_model(config)
    return count(lambda: hidden_states(encoder, pixels, [layer]))


def language_model(config: Any) -> nn.Module:
    """A causal language model on the meta device whose attention the counter sees."""
    from transformers import AutoModelForCausalLM

    return on_meta(lambda: AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def prefill_flops(model: nn.Module, tokens: int, head: bool = True) -> Flops:
    """FLOPs of a prompt of `tokens` positions; with `head` the logits of all of them."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="meta")
    positions = torch.arange(tokens, device="meta")[None]
    net = model if head else model.base_model
    return count(lambda: net(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False))


def body_flops(config_class: type, dimensions: Mapping[str, Any], tokens: int) -> int:
    """FLOPs of all decoder layers on a prompt, without the head; one layer is counted, since all are alike."""
    layer = language_model(config_class(**dimensions | {"num_hidden_layers": 1}))
    return prefill_flops(layer, tokens, head=False).total * dimensions["num_hidden_layers"]


def views_and_tokens(media: Mapping[str, Any], size: MediaSize, side: int) -> tuple[int, int]:
    """Views and visual tokens of a media item.

    Args:
        media: `views` and `arrange` of its modality.
        side: Rows, and columns, of a view's tokens.
    """
    plan = PLANNERS.build(media["views"]).plan(size)
    layout = ARRANGEMENTS.build(media["arrange"]).layout(plan, [(1, side, side)] * len(plan.views))
    return len(plan.views), sum(run.visual for run in layout)


def module_flops(module: nn.Module, *shapes: tuple[int, ...]) -> Flops:
    """FLOPs of a module on inputs of these shapes."""
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    return count(lambda: module(*inputs))


def cache_bytes(config: Any, tokens: int, bytes_per_value: int = 2) -> int:
    """Keys and values of `tokens` positions in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * bytes_per_value * tokens


def lora_parameters(model: nn.Module, rank: int, skip: Iterable[str] = ("lm_head",)) -> int:
    """Parameters of LoRA matrices on every linear layer but those named in `skip`."""
    return sum(
        rank * (layer.in_features + layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not any(word in name for word in skip)
    )


@dataclass(frozen=True)
class CostRow:
    """One counted quantity.

    Attributes:
        name: What was counted.
        value: The count.
        unit: "FLOPs", "parameters", "tokens", "bytes" or a ratio's "%".
        paper: What the paper says, if it does, in its own words or digits.
        group: Heading under which tables show the row.
    """

    name: str
    value: float
    unit: str
    paper: str | None = None
    group: str = ""


@dataclass
class CostReport:
    """Everything counted for one system.

    Attributes:
        slug: The system.
        rows: Counted quantities.
        notes: What a reader must know to read them, one sentence each.
    """

    slug: str
    rows: list[CostRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, paper: str | None = None, group: str = "") -> None:
        """Append a row."""
        self.rows.append(CostRow(name, value, unit, paper, group))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"system": self.slug, "rows": [asdict(row) for row in self.rows], "notes": self.notes}

    def table(self) -> Any:
        """A rich table."""
        from rich.table import Table

        table = Table(title=f"Cost of {self.slug}", caption="\n".join(self.notes) or None, caption_justify="left")
        table.add_column("quantity")
        table.add_column("counted", justify="right")
        table.add_column("unit")
        table.add_column("paper", justify="right")
        group = ""
        for row in self.rows:
            if row.group and row.group != group:
                group = row.group
                table.add_section()
                table.add_row(f"[bold]{group}[/bold]")
            table.add_row(row.name, formatted(row.value, row.unit), row.unit, row.paper or "")
        return table


def formatted(value: float, unit: str) -> str:
    """Counts in full with separators, ratios with two decimals."""
    if unit == "%":
        return f"{value:.2f}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4f}"
