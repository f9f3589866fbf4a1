"""How many bytes of tensors are alive: what a computation takes, also of fake tensors that have no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still exist, in its own thread.

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
