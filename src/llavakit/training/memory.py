"""Bytes: those of tensors that are alive, those that a training step takes, and those that are free."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llavakit.errors import RecipeError
from llavakit.training.recipe import Stage

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_GIVEN_BACK = 4 * 2**20  # bytes of a block that goes back to the system at once; at least one huge page lies in it
_KEPT = 4 * _GIVEN_BACK  # free bytes of smaller blocks that the process keeps at the end of its heap


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still exist, in its own thread; also of fake tensors.

    Args:
        without: Tensors that exist already and whose memory, of views of them for instance, does not count.

    Attributes:
        now: Bytes at present.
        peak: The most so far.
        at_peak: What `noting` gave when that was so.
    """

    def __init__(self, without: Iterable[Tensor] = (), noting: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: Any = None
        self._noting = noting
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in without}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.finalize(storage, self._gone, key, size)
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = self._noting() if self._noting is not None else None

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]


@dataclass
class Memory:
    """Bytes at the moment at which a step takes the most.

    Attributes:
        weights: Parameters and buffers.
        optimiser: What it keeps of earlier steps.
        gradients: Of the weights, as many as exist at that moment.
        activations: Kept for the backward pass, and what is being computed.
        loss: What the loss keeps: gradients of hidden states and of the output layer.
        samples: Prepared ones that are remembered, on a CPU.
        process: Interpreter and libraries, on a CPU.
        notes: What could not be counted.
    """

    weights: int = 0
    optimiser: int = 0
    gradients: int = 0
    activations: int = 0
    loss: int = 0
    samples: int = 0
    process: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def terms(self) -> dict[str, int]:
        """The terms that there are, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int) and value}

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self.terms.values())


def static_bytes(model: nn.Module, stage: Stage, *, loaded: bool = False) -> Memory:
    """Weights, gradients and an Adam's two averages: what every step takes, whatever its batch. Counts meta tensors.

    Args:
        loaded: Whether weights have the type in which the stage keeps them, and are sharded if they will be.
    """
    weights = sum(map(_own_bytes, (*model.parameters(), *model.buffers())))
    trained = sum(_own_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
    if stage.dtype == "bfloat16" and not loaded:
        weights, trained = weights // 2, trained // 2
    averages = 2 if stage.optimizer in ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused") else 0
    return Memory(weights=weights, gradients=trained, optimiser=averages * trained)


def _own_bytes(tensor: Tensor) -> int:
    """Of a sharded tensor those of this process."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def give_back_at_once() -> None:
    """Let the C library give large blocks back to the system as soon as they are free, for the whole process.

    It keeps what is below some tens of megabytes, which costs a step on a CPU a fifth more memory than its tensors. To
    ask the system again for every block takes time, which huge pages make up for; blocks too small for them are kept,
    since clearing them page by page would take a small model 40 % of its step. Only glibc has the switch.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch with its first large block
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _GIVEN_BACK)
        set_option(_TRIM_THRESHOLD, _KEPT)


def room_on(device: str) -> int:
    """Bytes that are free for training, what this process takes already included."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()))
    return free


def check_room(memory: Memory, room: int, where: str) -> None:
    """Refuse what does not fit.

    Raises:
        RecipeError: With all terms.
    """
    if memory.total > room:
        terms = ", ".join(f"{name} {in_gb(value)}" for name, value in memory.terms.items())
        raise RecipeError(
            f"{where}: takes {in_gb(memory.total)} of memory ({terms}), {in_gb(room)} are free; train fewer parts or "
            "LoRA, take dtype: bfloat16, gradient_checkpointing: light or smaller batches, or shard it"
        )


def in_gb(size: int) -> str:
    """As people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
