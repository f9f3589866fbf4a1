"""What an adapter computed against what is expected: tolerances, masks, structures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tolerance = tuple[float, float]  # atol, rtol


@dataclass
class Result:
    """What an adapter computed.

    Attributes:
        json: The structure that must equal `outputs.json`, or the part of it that an example is about.
        tensors: The tensors that must equal those of `outputs.safetensors`, by name. Names that the case does not
            have are not compared.
        mask: Tensor name -> bool tensor (broadcast to the output's shape), True where values are meaningful; use it
            for padding positions only.
        ignored: Output that is informational and therefore not computed -> reason. Keys are tensor names, or dotted
            paths into the JSON (`example.hf_difference`); `*` matches anything.
        tolerances: (atol, rtol) of single outputs, keyed like `ignored`, where the case's notes give them their own.
    """

    json: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Mapping[str, Tensor] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Result:
        """A `Result` as it is; of a plain mapping the tensors as `tensors` and the rest as `json`."""
        if isinstance(value, Result):
            return value
        if not isinstance(value, Mapping):
            return cls(json=value)
        tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
        rest = {name: item for name, item in value.items() if name not in tensors}
        return cls(json=rest or None, tensors=tensors)


class Comparison:
    """Collects differences between what an adapter computed and what is expected.

    Args:
        atol, rtol: Tolerance of the case.
        result: The adapter's result, for its masks, ignored outputs and single tolerances.
    """

    def __init__(self, atol: float, rtol: float, result: Result) -> None:
        self.atol, self.rtol, self.result = atol, rtol, result
        self.differences: list[str] = []
        self.skipped: dict[str, str] = {}
        self.compared = 0
        self.max_abs_error: float | None = None

    def skips(self, name: str) -> bool:
        for pattern, reason in self.result.ignored.items():
            if fnmatchcase(name, pattern):
                self.skipped[name] = reason
                return True
        return False

    def _tolerance(self, name: str) -> Tolerance:
        for pattern, tolerance in self.result.tolerances.items():
            if fnmatchcase(name, pattern):
                return tolerance
        return self.atol, self.rtol

    def _saw(self, error: float) -> None:
        if math.isnan(error):
            error = math.inf
        self.max_abs_error = max(error, self.max_abs_error or 0.0)

    def tensor(self, name: str, expected: Tensor) -> None:
        """Compare the output tensor `name`; integers may differ by atol, never by rtol."""
        if self.skips(name):
            return
        self.compared += 1
        value = self.result.tensors.get(name)
        if value is None:
            self.differences.append(f"output {name} is missing")
            return
        value = torch.as_tensor(value).detach().cpu()
        if value.shape != expected.shape:
            self.differences.append(f"{name}: shape {list(value.shape)}, expected {list(expected.shape)}")
            return
        atol, rtol = self._tolerance(name)
        exact = not (expected.is_floating_point() or expected.is_complex())
        # Integers are subtracted as integers: float64 does not hold every int64.
        wide = torch.int64 if exact and not value.is_floating_point() else torch.float64
        value, wanted = value.to(wide), expected.to(wide)
        error = (value - wanted).abs().double()
        if not exact:
            same = (value == wanted) | (value.isnan() & wanted.isnan())  # infinities and NaN on both sides
            error = error.masked_fill(same, 0.0)
        if name in self.result.mask:
            meaningful = torch.as_tensor(self.result.mask[name]).cpu().bool()
            error = error.masked_fill(~meaningful.expand_as(error), 0.0)
        if error.numel() == 0:
            return
        self._saw(float(error.max()) if not error.isnan().any() else math.inf)
        allowed = torch.full_like(error, atol) if exact else atol + rtol * wanted.abs().nan_to_num(nan=0.0, posinf=0.0)
        beyond = ~(error <= allowed)
        if beyond.any():
            worst = int(error.nan_to_num(nan=math.inf).masked_fill(~beyond, -1.0).argmax())
            place = [int(index) for index in np.unravel_index(worst, tuple(error.shape))]
            self.differences.append(
                f"{name}{place}: {value.flatten()[worst].item():.6g}, expected {wanted.flatten()[worst].item():.6g}"
                f" ({int(beyond.sum())} of {beyond.numel()} values differ)"
            )

    def structure(self, value: Any, expected: Any, path: str = "") -> None:
        """Compare JSON recursively; floats within tolerance, all else exactly.

        Keys of the outermost object that the case does not have are not compared.
        """
        if path and self.skips(path):
            return
        label = path or "outputs.json"
        if isinstance(expected, dict) and isinstance(value, dict):
            for key, item in expected.items():
                inner = f"{path}.{key}" if path else key
                if key in value:
                    self.structure(value[key], item, inner)
                elif not self.skips(inner):
                    self.differences.append(f"output {inner} is missing")
            surplus = [key for key in value if key not in expected] if path else []
            if surplus:
                self.differences.append(f"{label}: unexpected {', '.join(map(repr, surplus))}")
            return
        self.compared += 1
        if isinstance(expected, list) and isinstance(value, list):
            for index, (ours, theirs) in enumerate(zip(value, expected, strict=False)):
                self.structure(ours, theirs, f"{path}.{index}" if path else str(index))
            if len(value) != len(expected):
                self.differences.append(f"{label}: {len(value)} items, expected {len(expected)}")
        elif _is_number(value) and _is_number(expected):
            self._number(label, path, value, expected)
        elif type(value) is not type(expected) or value != expected:
            self.differences.append(f"{label}: {_short(value)}, expected {_short(expected)}")

    def _number(self, label: str, path: str, value: float, expected: float) -> None:
        same = value == expected or (math.isnan(value) and math.isnan(expected))
        error = 0.0 if same else abs(value - expected)
        if isinstance(expected, float):
            self._saw(error)
        atol, rtol = self._tolerance(path)
        allowed = atol + rtol * abs(expected) if isinstance(expected, float) and math.isfinite(expected) else 0.0
        if not error <= allowed:
            self.differences.append(f"{label}: {value!r}, expected {expected!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: lists for tuples and arrays, string keys, Python numbers."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else json.dumps(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return str(value) if isinstance(value, (str, Path)) else value
