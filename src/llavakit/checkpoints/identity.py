"""What files are, by their content: the same wherever they lie and however their path is written.

Small files are read whole. Of large ones blocks are read that are spread evenly over every tensor (or over the file),
so that a model of many gigabytes is known in well under a second. Training changes values everywhere, and a copy
changes none; an edit by hand of a few values in a large tensor can go unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llavakit.errors import CheckpointError

WHOLE = 1024**2  # bytes up to which a tensor or file is read whole
BLOCK, BLOCKS = 4096, 64
# Keys of a configuration that say who wrote it, not what the model is.
_COSMETIC = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}


def file_identity(path: Path) -> str:
    """Hexadecimal digest of a file's size and content.

    Raises:
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in _blocks(file, 0, size):
            digest.update(block)
    return digest.hexdigest()


def model_identity(folder: Path) -> str:
    """Hexadecimal digest of a model folder: what its configuration means, and names, shapes and values of its tensors.

    Raises:
        CheckpointError: If the folder holds no weights, or a file of them cannot be read.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            digest.update(_meaning(folder / name))
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise CheckpointError(f"{folder}: no weights; it should hold .safetensors or .bin files")
    try:
        tensors = [entry for path in weights for entry in _tensors(path)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read ({error})") from None
    for entry in sorted(tensors):
        digest.update(entry)
    return digest.hexdigest()


def _meaning(path: Path) -> bytes:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return json.dumps(without_cosmetics(raw), sort_keys=True).encode()


def without_cosmetics(value: Any) -> Any:
    """A configuration without the keys that say who wrote it."""
    if isinstance(value, dict):
        return {key: without_cosmetics(item) for key, item in value.items() if key not in _COSMETIC}
    return [without_cosmetics(item) for item in value] if isinstance(value, list) else value


def _tensors(path: Path) -> Iterator[bytes]:
    """Digest of every tensor of a safetensors file; of other files one digest of the whole."""
    if path.suffix != ".safetensors":
        yield file_identity(path).encode()
        return
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is not a safetensors file")
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            for block in _blocks(file, 8 + length + begin, end - begin):
                digest.update(block)
            yield digest.digest()


def _blocks(file: BinaryIO, begin: int, size: int) -> Iterator[bytes]:
    if size <= WHOLE:
        file.seek(begin)
        yield file.read(size)
        return
    for number in range(BLOCKS):
        file.seek(begin + (size - BLOCK) * number // (BLOCKS - 1))
        yield file.read(BLOCK)
