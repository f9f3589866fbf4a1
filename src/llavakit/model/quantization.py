"""Linear layers with weights of 8 or 4 bits, for inference.

Weights alone are quantised: what a layer reads keeps (nearly) its precision, and a row of a batch never depends on its
neighbours. On a CPU PyTorch's own kernels run; on other devices torchao's (`pip install 'llavakit[quantize]'`), which
on a CPU take longer than float32.

- **int8**, CPU: one scale per output, FBGEMM's product of 8-bit integers. A row is split into two integers of 7 bits,
  the coarse part and what it leaves, so that 14 bits of it remain; both are rows of one product, which reads the
  weights once.
- **int4**, CPU: groups of 32 weights with a scale and a zero each, PyTorch's product of bfloat16 rows with packed
  4-bit weights. The head has 8 bits.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.errors import UserError
from llavakit.language.head import finished
from llavakit.registry import nearest

FORMATS = ("int8", "int4")
DECODER = "language_model"
_GROUP = 32  # weights that share a scale in int4
_TILE = 16  # outputs that PyTorch packs together in int4
_LEVELS = 64  # of a row's coarse part, on either side of zero; twice 128 * 127 still fits the kernel's 16 bits
# Tensors, because a number is made into one in every call, which takes as long as a small product. They are on the CPU
# whatever the default device is when this module is imported: a coarse step as a share of the largest value of the row,
# the step of a row of zeros, and fine steps in a coarse one and the inverse.
_STEP, _LEAST, _FINER, _FINE_STEP = torch.tensor(
    [1 / _LEVELS, 1e-30, 128.0, 1 / 128], dtype=torch.float32, device="cpu"
).unbind()
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # they read the same, so one product makes them


class _Int8:
    """A weight [outputs, inputs] of 8 bits as a function of rows [rows, inputs] in float32."""

    def __init__(self, weight: Tensor) -> None:
        scale = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.zeros(len(weight), dtype=torch.long)
        with _fbgemm():
            whole = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(whole, None)

    def kept(self) -> Iterator[Tensor]:
        whole = torch.ops.quantized.linear_unpack(self.packed)[0]
        yield from (whole.int_repr(), whole.q_per_channel_scales())

    def __call__(self, rows: Tensor) -> Tensor:
        step = rows.abs().amax(-1, True).mul_(_STEP).clamp_min_(_LEAST)
        scaled = rows / step
        coarse = scaled.round()
        both = torch.cat((coarse, scaled.sub_(coarse).mul_(_FINER)))
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        coarse, fine = product(both, 1.0, _LEVELS, self.packed).chunk(2)
        return coarse.addcmul_(fine, _FINE_STEP).mul_(step)


class _Int4:
    """A weight [outputs, inputs] of 4 bits as a function of rows [rows, inputs]."""

    def __init__(self, weight: Tensor) -> None:
        outputs, inputs = weight.shape
        groups = weight.view(outputs, -1, _GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-8).bfloat16().float()
        whole = ((groups - low) / scale).round().clamp(0, 15).int().view(outputs, inputs)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
        middle = low + 8 * scale  # the kernel counts from 8
        self.groups = torch.cat([scale, middle], -1).transpose(0, 1).bfloat16().contiguous()

    def kept(self) -> Iterator[Tensor]:
        yield from (self.packed, self.groups.float())

    def __call__(self, rows: Tensor) -> Tensor:
        made = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), self.packed, _GROUP, self.groups)
        return made.float()


class QuantizedLinear(nn.Module):
    """A linear layer of which only a quantised weight is kept.

    Args:
        kernel: A function of rows [rows, inputs] in float32; `kept` gives its tensors.
        inputs, outputs: Widths.
        bias: [outputs], or None.
    """

    def __init__(self, kernel: _Int8 | _Int4, inputs: int, outputs: int, bias: Tensor | None) -> None:
        super().__init__()
        self.kernel, self.in_features, self.out_features = kernel, inputs, outputs
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., inputs] to [..., outputs].

        Raises:
            UserError: If a gradient would have to go through.
        """
        if hidden.requires_grad and torch.is_grad_enabled():
            raise UserError("a quantised layer gives no gradients; load the model without quantize")
        made = self.kernel(hidden.reshape(-1, self.in_features).float())
        if self.bias is not None:
            made = made.add_(self.bias)
        return made.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)

    def get_extra_state(self) -> str:
        """Form and content, so that a model's digest knows them."""
        digest = hashlib.sha256(type(self.kernel).__name__.encode())
        for tensor in self.kernel.kept():
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {type(self.kernel).__name__.strip('_').lower()}"


class QuantizedHead(QuantizedLinear):
    """A `Head` of which only a quantised weight is kept."""

    scale: float = 1.0
    cap: float | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        return finished(super().forward(hidden), self.scale, self.cap)


class _Piece(nn.Module):
    """One of several layers that read the same: a slice of what their common layer makes, which is made once.

    Args:
        common: The layer whose outputs hold this one's. Only the first piece owns it.
        start, stop: Which of its outputs.
    """

    def __init__(self, common: _Common, start: int, stop: int, *, first: bool) -> None:
        super().__init__()
        self.start, self.stop = start, stop
        self.in_features, self.out_features = common.in_features, stop - start
        if first:
            self.common = common
        else:
            self._common = (common,)  # a tuple hides it: a module belongs to one parent

    def forward(self, hidden: Tensor) -> Tensor:
        common = self.common if hasattr(self, "common") else self._common[0]
        return common.made_of(hidden)[..., self.start : self.stop]


class _Common(QuantizedLinear):
    """The layer behind `_Piece`s; remembers what it made of its last input until every piece has read it."""

    pieces = 0
    _last: tuple[Tensor, Tensor, int] | None = None

    def made_of(self, hidden: Tensor) -> Tensor:
        last = self._last
        if last is not None and last[0] is hidden:
            _, made, read = last
        else:
            made, read = self(hidden), 0
        self._last = (hidden, made, read + 1) if read + 1 < self.pieces else None
        return made


@torch.no_grad()
def quantize(model: nn.Module, form: str, parts: Sequence[str] | None = None) -> nn.Module:
    """Replace the linear layers of a model's parts by layers with quantised weights, in place.

    Args:
        model: A `LlavakitForConditionalGeneration` in evaluation mode.
        form: "int8" or "int4".
        parts: Names of parts: `language_model` (with the head), an encoder's (`vision_tower`) or a connector's
            (`multi_modal_projector`). Default: the decoder alone.

    Raises:
        UserError: If form or part is unknown, a part has no linear layers, or a layer does not fit.
    """
    check_form(form)
    chosen = list(dict.fromkeys(parts or [DECODER]))
    core = model.model
    known = [name for name, part in core.named_children() if any(type(one) is nn.Linear for one in part.modules())]
    for name in chosen:
        if name not in known and hasattr(core, name) and isinstance(getattr(core, name), nn.Module):
            kind = type(getattr(core, name)).__name__
            raise UserError(f"quantize: {name} ({kind}) has no linear layers that could be quantised")
        if name not in known:
            raise UserError(
                f"quantize: the model has no part {name!r}{nearest(name, known)}; parts: {', '.join(known)}"
            )
    if core.device.type != "cpu":
        _by_torchao(model, form, chosen)
        return model
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UserError(f"quantize: {form} on a CPU needs FBGEMM, which this build of PyTorch has for x86 alone")
    if form == "int4":
        _check_int4(core, chosen)
    for name in chosen:
        part = getattr(core, name)
        for module in list(part.modules()):
            _replace_in(module, _Int8 if form == "int8" else _Int4)
    if DECODER in chosen:
        head = model.lm_head
        model.lm_head = _layer(QuantizedHead, _Int8, [head])
        model.lm_head.scale, model.lm_head.cap = head.scale, head.cap
    return model


def check_form(form: str) -> None:
    """Refuse an unknown form before anything is read.

    Raises:
        UserError: If it is none of `FORMATS`.
    """
    if form not in FORMATS:
        raise UserError(f"quantize: {form!r} is unknown{nearest(form, FORMATS)}; known: {', '.join(FORMATS)}")


def _replace_in(parent: nn.Module, kernel: Callable[[Tensor], Any]) -> None:
    for names in _TOGETHER:
        layers = [getattr(parent, name, None) for name in names]
        if not all(type(layer) is nn.Linear for layer in layers):
            continue
        if len({layer.in_features for layer in layers} | {layer.bias is None for layer in layers}) != 2:
            continue  # they differ in what they read, or in having a bias
        common = _layer(_Common, kernel, layers)
        common.pieces, start = len(layers), 0
        for name, layer in zip(names, layers, strict=True):
            setattr(parent, name, _Piece(common, start, start + layer.out_features, first=start == 0))
            start += layer.out_features
    for name, layer in list(parent.named_children()):
        if type(layer) is nn.Linear:
            setattr(parent, name, _layer(QuantizedLinear, kernel, [layer]))


def _layer(cls: type[QuantizedLinear], kernel: Callable[[Tensor], Any], layers: Sequence[nn.Linear]) -> Any:
    weight = torch.cat([layer.weight.detach().float() for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat([one.detach().float() for one in biases]) if biases else None
    return cls(kernel(weight), weight.shape[1], weight.shape[0], bias)


def _check_int4(core: nn.Module, parts: Sequence[str]) -> None:
    for part in parts:
        for name, layer in getattr(core, part).named_modules():
            if type(layer) is not nn.Linear:
                continue
            for width, what, step in ((layer.in_features, "in", _GROUP), (layer.out_features, "out", _TILE)):
                if width % step:
                    raise UserError(
                        f"quantize: int4 takes layers with a multiple of {step} {what}puts, {part}.{name} has {width}; "
                        "int8 takes any"
                    )


def _by_torchao(model: nn.Module, form: str, parts: Sequence[str]) -> None:
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(
            f"quantize: needs torchao on {model.device.type}; pip install 'llavakit[quantize]' ({error})"
        ) from None
    config = Int8WeightOnlyConfig() if form == "int8" else Int4WeightOnlyConfig(group_size=_GROUP)
    try:
        for name in parts:
            quantize_(getattr(model.model, name), config)
        if DECODER in parts:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
            quantize_(
                model.lm_head, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear)
            )
    except (ImportError, AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"quantize: torchao cannot make {form} weights on {model.device.type} ({said})") from None


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Weights that are packed inside are packed for FBGEMM."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.quantize_per_tensor"
            )  # will go; the pins hold releases that have it
            yield
    finally:
        torch.backends.quantized.engine = engine
