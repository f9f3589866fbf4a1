"""Checkpoint files: read any published form lazily, write safetensors atomically.

Knows files and tensors, not what the names mean (that is `layouts`). Pickled files are read with weights-only
loading; only safetensors are written.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llavakit.data import strict_json
from llavakit.errors import CheckpointError, UserError, WriteError, quoted

SHARD_BYTES = 5 * 1024**3


class LazyState(Mapping[str, Tensor]):
    """Tensors by name, read from disk when they are asked for.

    Args:
        readers: Name -> function that reads the tensor.
        origin: Name -> file that holds it, for messages.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]], origin: Mapping[str, str]) -> None:
        self._readers, self.origin = dict(readers), dict(origin)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LazyState:
        """Tensors of any mapping, asked of it when they are wanted."""
        return cls({name: functools.partial(tensors.__getitem__, name) for name in tensors}, {})

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:  # a mapping's own would read the tensor
        return name in self._readers

    def renamed(self, rename: Callable[[str], str | None]) -> LazyState:
        """The same tensors under other names; those renamed to None are left out."""
        readers, origin = {}, {}
        for old, read in self._readers.items():
            new = rename(old)
            if new is None:
                continue
            if new in readers:
                raise CheckpointError(f"{self.origin[old]}: tensors {old!r} and another both become {new!r}")
            readers[new], origin[new] = read, self.origin.get(old, "")
        return LazyState(readers, origin)

    def changed(self, name: str, function: Callable[[Tensor], Tensor]) -> LazyState:
        """The same tensors, one of them as a function makes it of itself when it is read."""
        return LazyState(self._readers | {name: lambda: function(self[name])}, self.origin)

    def checked(self, shapes: Mapping[str, Sequence[int]], folder: Path) -> LazyState:
        """The same tensors; one of another shape, or that holds NaN, raises `CheckpointError` when it is read."""

        def reader(name: str) -> Callable[[], Tensor]:
            def read() -> Tensor:
                tensor = self[name]
                where = f"{folder}/{self.origin.get(name, '')}"
                check_tensor(where, name, tensor, shapes.get(name, tensor.shape))
                return tensor

            return read

        return LazyState({name: reader(name) for name in self}, self.origin)

    def split(self, name: str, parts: Sequence[str]) -> LazyState:
        """The same tensors, one of them cut along its first dimension into equal parts (a fused qkv, for instance).

        Args:
            name: The tensor that is cut.
            parts: Names of the parts in order; one name alone renames it.

        Raises:
            CheckpointError: When a part is read, if the tensor cannot be cut so; at once, if a name is taken.
        """
        taken = next((part for part in parts if part in self and part != name), None)
        if taken is not None:
            raise CheckpointError(f"{self.origin.get(name, '')}: holds {quoted(name)} and {quoted(taken)}, which it is")

        def reader(number: int) -> Callable[[], Tensor]:
            def read() -> Tensor:
                whole = self[name]
                if whole.dim() == 0 or whole.shape[0] % len(parts):
                    raise CheckpointError(
                        f"{self.origin.get(name, '')}: tensor {quoted(name)} of shape {list(whole.shape)} has no "
                        f"{len(parts)} equal parts"
                    )
                return whole if len(parts) == 1 else whole.chunk(len(parts))[number].contiguous()

            return read

        readers = {key: read for key, read in self._readers.items() if key != name}
        readers |= {part: reader(number) for number, part in enumerate(parts)}
        return LazyState(readers, self.origin | dict.fromkeys(parts, self.origin.get(name, "")))

    def added(self, base: LazyState, overlapping: Callable[[str], bool] = lambda name: False) -> LazyState:
        """These tensors as differences: each that the base has is added to it, in the type of the difference.

        Args:
            base: What the differences were taken from; every tensor of it must be here.
            overlapping: Names of tensors that may be larger here (a grown vocabulary); the base is added to their
                first rows and columns.

        Raises:
            CheckpointError: If the base has a tensor that is not here; when a tensor is read, if shapes differ.
        """
        return self._beside(base, overlapping, 1, "weight differences", "difference")

    def subtracted(self, base: LazyState, overlapping: Callable[[str], bool] = lambda name: False) -> LazyState:
        """The differences of these tensors to a base, in their own type; the way back is `added`.

        Args:
            base: Every tensor of it must be here; what it does not have stays as it is.
            overlapping: Names of tensors that may be larger here.

        Raises:
            CheckpointError: As `added`.
        """
        return self._beside(base, overlapping, -1, "model", "tensor")

    def _beside(
        self, base: LazyState, overlapping: Callable[[str], bool], factor: int, all_are: str, one_is: str
    ) -> LazyState:
        absent = next((name for name in base if name not in self), None)
        if absent is not None:
            raise CheckpointError(
                f"the base model has {quoted(absent)}, which the {all_are} {'do' if factor > 0 else 'does'} not have"
            )

        def reader(name: str) -> Callable[[], Tensor]:
            def read() -> Tensor:
                here, own = self[name], base[name]
                fits = here.dim() == own.dim() and all(a >= b for a, b in zip(here.shape, own.shape, strict=True))
                if here.shape != own.shape and not (overlapping(name) and fits):
                    raise CheckpointError(
                        f"{self.origin.get(name, '')}: the {one_is} {quoted(name)} has shape {list(here.shape)}, "
                        f"the base model's tensor {list(own.shape)}"
                    )
                total = here.clone()
                total[tuple(slice(side) for side in own.shape)] += factor * own.to(here.dtype)
                return total

            return read

        changed = {name: reader(name) for name in base}
        return LazyState(self._readers | changed, self.origin)

    def joined(self, other: Mapping[str, Tensor]) -> LazyState:
        """These tensors and others; the others win."""
        if not isinstance(other, LazyState):
            other = LazyState.of(other)
        return LazyState(self._readers | other._readers, self.origin | other.origin)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        CheckpointError: If there is none; see `llavakit.data.strict_json`.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; a model folder holds config.json")
    return strict_json.read_json(path, kind=dict, error=CheckpointError)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """One guard for all that reads a file: whatever transformers, tokenizers or a layout raise becomes one line.

    Args:
        path: The file.

    Raises:
        CheckpointError: In place of any exception; it names the file.
    """
    try:
        yield
    except CheckpointError as error:
        if not str(error).startswith(f"{path.name}: "):
            raise
        raise CheckpointError(f"{path.parent}/{error}") from error
    except (NameError, AssertionError):
        raise  # a mistake of ours
    except Exception as error:  # foreign readers raise anything at all on broken values
        raise CheckpointError(f"{path}: {said(error)}") from error


def said(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError) and lines:
        return lines[0]
    if isinstance(error, KeyError):
        return f"{quoted(error.args[0] if error.args else None)} is missing or unknown"
    if not lines:
        return type(error).__name__
    line = lines[0] if isinstance(error, OSError) else lines[-1]  # strict configurations say the reason last
    return line if len(line) <= 300 else line[:297] + "..."


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A state dict from a pickled file, weights only; also one that a training checkpoint holds as `state_dict`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable state dict ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, it should hold a state dict")
    inner = state.get("state_dict")
    state = inner if isinstance(inner, dict) else state
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {quoted(name)} is a {type(tensor).__name__}, it should be a tensor")
    return dict(state)


def read_file(path: Path) -> LazyState:
    """All tensors of one .safetensors or pickled file."""
    if path.suffix != ".safetensors":
        state = read_pickle(path)
        return LazyState({n: (lambda t=t: t) for n, t in state.items()}, dict.fromkeys(state, path.name))
    try:
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as handle:
                return handle.get_tensor(name)

        return read

    return LazyState({name: reader(name) for name in names}, dict.fromkeys(names, path.name))


def read_folder(folder: Path, stem: str | None = None) -> LazyState:
    """All tensors of a model folder: sharded or single, safetensors or pickled.

    Args:
        folder: The folder.
        stem: Read only `stem.safetensors` or `stem.bin` ("adapter_model", "mm_projector", ...).

    Raises:
        CheckpointError: If there are no weights, or a shard that the index names is missing.
    """
    stems = [stem] if stem else ["model", "pytorch_model"]
    for name in stems:
        for suffix in ("safetensors", "bin"):
            index = folder / f"{name}.{suffix}.index.json"
            if index.is_file():
                return _read_shards(folder, index)
            if (folder / f"{name}.{suffix}").is_file():
                return read_file(folder / f"{name}.{suffix}")
    wanted = f"{stem}.safetensors or {stem}.bin" if stem else "model.safetensors, a sharded index or pytorch_model.bin"
    raise CheckpointError(f"{folder}: no weights; it should hold {wanted}")


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model, sharded or not."""
    names = ("model.safetensors", "pytorch_model.bin")
    return any((folder / f"{name}{suffix}").is_file() for name in names for suffix in ("", ".index.json"))


def _read_shards(folder: Path, index: Path) -> LazyState:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {quoted(weight_map)}, it should map names of tensors to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {quoted(name)} is in {quoted(shard)}, it should be a file of this folder")
    state = LazyState({}, {})
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: missing; {index.name} names it")
        held = read_file(folder / shard)
        twice = next((name for name in held if name in state), None)
        if twice is not None:
            raise CheckpointError(f"{index}: {state.origin[twice]} and {shard} both hold {quoted(twice)}")
        state = state.joined(held)
    for name, shard in weight_map.items():
        if name not in state or state.origin[name] != shard:
            raise CheckpointError(f"{index}: names {quoted(name)}, but {shard} does not hold it")
    unnamed = next((name for name in state if name not in weight_map), None)
    if unnamed is not None:
        raise CheckpointError(f"{index}: does not name {quoted(unnamed)}, which {state.origin[unnamed]} holds")
    return state


# How the libraries that write files say it when the file system refuses.
_REFUSALS = ("(os error ", "PytorchStreamWriter", "inline_container", "iostream", "file write failed")


@contextmanager
def clear_write_errors(target: Path, kept: str = "nothing was changed") -> Iterator[None]:
    """Turn the ways in which libraries report a full disk into one clear line; the outermost target is named.

    Args:
        target: What is being written.
        kept: What is still there if it fails, and what to do.

    Raises:
        WriteError: If the file system refused.
    """
    try:
        yield
    except WriteError as error:
        raise WriteError(target, error.reason, kept) from error
    except OSError as error:
        raise WriteError(target, error.strerror or str(error), kept) from error
    except Exception as error:  # safetensors, tokenizers and PyTorch raise classes of their own
        text = " ".join(str(error).split())
        if not any(word in text for word in _REFUSALS):
            raise
        said = re.search(r"([\w ]+) \(os error \d+\)", text)
        raise WriteError(target, said[1].strip() if said else "the file system refused", kept) from error


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that replaces it only if everything in it was written.

    If writing fails (a full disk, an interrupt) the previous content of `target` stays whole and the half-written
    folder is removed. Everything is on the disk before the new folder takes the old one's place, so a power cut leaves
    one or the other.

    Raises:
        WriteError: If the file system refuses, with its reason.
    """
    target = Path(target)
    with clear_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        previous = target.parent / f".{target.name}.previous"
        if previous.exists() and not target.exists():  # an earlier process was killed between the two renames
            previous.rename(target)
        try:
            yield scratch
            scratch.chmod(0o755)
            sync_folder(scratch)  # while the old one is still there; what follows takes no time
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)
                target.rename(previous)
            move_durably(scratch, target)
            shutil.rmtree(previous, ignore_errors=True)
        finally:
            if not target.exists() and previous.exists():
                previous.rename(target)
            shutil.rmtree(scratch, ignore_errors=True)


def move_durably(source: Path, target: Path) -> None:
    """Rename a folder once everything in it is on the disk, so that not even a power cut leaves a part of it.

    Raises:
        OSError: If the file system refuses.
    """
    sync_folder(source)
    source.rename(target)
    _sync(target.parent)


def sync_folder(folder: Path) -> None:
    """Have the system write a folder's files, and the names of the files, to the disk."""
    for parent, _, files in os.walk(folder):
        for file in files:
            _sync(Path(parent, file))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # not every file system can
            raise
    finally:
        os.close(descriptor)


def write_state(folder: Path, state: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as `model.safetensors`, or as numbered shards with an index when they exceed `shard_bytes`.

    Tensors are taken one by one, so a lazily read checkpoint is converted within the memory of one shard.
    """
    shards: list[dict[str, Tensor]] = [{}]
    names: list[list[str]] = []
    total = size = 0

    def flush() -> None:
        number = len(names) + 1
        save_file(shards[0], folder / f"shard-{number:05d}.safetensors", metadata={"format": "pt"})
        names.append(list(shards[0]))
        shards[0] = {}

    for name, tensor in state:
        nbytes = tensor.numel() * tensor.element_size()
        if shards[0] and size + nbytes > shard_bytes:
            flush()
            size = 0
        shards[0][name] = tensor.detach().contiguous().clone() if tensor.requires_grad else tensor.contiguous()
        size += nbytes
        total += nbytes
    flush()
    if len(names) == 1:
        (folder / "shard-00001.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(names, start=1):
        final = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        (folder / f"shard-{number:05d}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(shard, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def check_tensor(where: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuse a tensor of another shape, or with values that are no numbers.

    Raises:
        CheckpointError: It names the file and what is wrong.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"{where}: tensor {quoted(name)} has shape {list(tensor.shape)}, the configuration calls for {list(shape)}"
        )
    if tensor.is_floating_point() and tensor.numel():
        # one pass, far cheaper than isfinite: NaN spreads to both ends
        low, high = torch.aminmax(tensor.float() if tensor.element_size() < 2 else tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(f"{where}: tensor {quoted(name)} holds values that are not finite (NaN or infinity)")


def assign_state(
    model: nn.Module,
    state: LazyState,
    *,
    where: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    optional: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Give a model (usually on the meta device) its tensors, strictly.

    Args:
        where: Folder or file, for messages.
        dtype: Convert floating-point tensors to this.
        optional: Names that may be absent from the file; they are returned, still without weights.

    Raises:
        CheckpointError: If a tensor is missing, superfluous, has the wrong shape or holds NaN.
    """
    own = dict(model.state_dict(keep_vars=True))
    tied = {name for name in getattr(model, "_tied_weights_keys", None) or {} if name not in state}
    missing = [name for name in own if name not in state and name not in tied and not optional(name)]
    extra = [name for name in state if name not in own]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing{more}; the configuration calls for it")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        file = state.origin.get(extra[0], "")
        raise CheckpointError(f"{where}/{file}: tensor {extra[0]!r} is unknown to the configuration{more}")
    absent = []
    for name, slot in own.items():
        if name not in state:
            if name not in tied:
                absent.append(name)
            continue
        tensor = state[name]
        check_tensor(f"{where}/{state.origin.get(name, '')}", name, tensor, slot.shape)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        _assign(model, name, tensor.to(device), slot)
    return absent


def _assign(model: nn.Module, name: str, tensor: Tensor, slot: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(slot, nn.Parameter):
        module.register_parameter(attribute, nn.Parameter(tensor, requires_grad=slot.requires_grad))
    else:
        module.register_buffer(attribute, tensor)
