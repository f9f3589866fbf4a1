"""Files and models are known by their content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llavakit.checkpoints.identity import BLOCK, WHOLE, file_identity, model_identity
from llavakit.errors import CheckpointError


def _model(folder: Path, *shards: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}.safetensors")
    return folder


def test_a_model_is_its_tensors_and_the_meaning_of_its_configuration(tmp_path: Path) -> None:
    big, small = torch.randn(WHOLE // 2), torch.zeros(3)  # 2 MiB: read in blocks
    first = model_identity(_model(tmp_path / "one", {"a": big, "b": small}))
    again = _model(tmp_path / "two", {"b": small}, {"a": big}, transformers_version="5.0", _name_or_path="/elsewhere")
    assert model_identity(again) == first
    changed = {
        "value": _model(tmp_path / "value", {"a": big, "b": small + 1}),
        "all values of a large tensor": _model(tmp_path / "large", {"a": big * 1.01, "b": small}),
        "name": _model(tmp_path / "name", {"a": big, "c": small}),
        "shape": _model(tmp_path / "shape", {"a": big.view(2, -1), "b": small}),
        "configuration": _model(tmp_path / "config", {"a": big, "b": small}, rope_theta=5.0),
    }
    identities = {what: model_identity(folder) for what, folder in changed.items()}
    assert first not in identities.values()
    assert len(set(identities.values())) == len(identities)


def test_a_folder_without_readable_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        model_identity(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="cannot be read"):
        model_identity(tmp_path)


def test_both_ends_of_a_large_file_count(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    content = bytearray(3 * WHOLE)
    identities = set()
    for place in (None, 0, -1, BLOCK - 1):
        if place is not None:
            content[place] ^= 1
        path.write_bytes(content)
        identities.add(file_identity(path))
    path.write_bytes(content + b"\0")
    assert len(identities | {file_identity(path)}) == 5
