"""Malformed model folders: configurations, processors, tokenizers, weights and their maps."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from harness import Faults
from mutations import ODD, json_text, scramble, scrambled_json, twist

sys.path.insert(0, str(Path(__file__).parents[1]))
from export_cases import write
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_classic

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.inspect import inspect_model
from llavakit.checkpoints.opening import build, load_processor, open_checkpoint
from llavakit.data.strict_json import parse_json


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One model in every layout."""
    root = tmp_path_factory.mktemp("models")
    write(root / "own", "clip", "llama")
    convert(root / "own", root / "hf", to="hf")
    convert(root / "own", root / "original", to="original")
    (root / "own" / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.5}')
    return {path.name: path for path in root.iterdir()}


def damaged(source: Path, target: Path, file: str, content: bytes) -> Path:
    """The folder with one file replaced; the others are links."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != file:
            (target / path.name).symlink_to(path)
    (target / file).write_bytes(content)
    return target


def use(folder: Path) -> None:
    """All that a command does with a folder before it answers."""
    checkpoint = open_checkpoint(folder)
    load_processor(checkpoint)
    build(checkpoint)


JSON_FILES = {
    "own": ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json"),
    "hf": ("config.json", "processor_config.json", "tokenizer_config.json"),
    "original": ("config.json",),
}


@pytest.mark.parametrize(("layout", "file"), [(layout, file) for layout, files in JSON_FILES.items() for file in files])
def test_json_files(faults: Faults, folders, tmp_path, layout, file) -> None:
    value = json.loads((folders[layout] / file).read_text())
    for number in range(60):
        rng = random.Random(number)
        folder = damaged(folders[layout], tmp_path / str(number), file, scrambled_json(value, rng))
        faults.attempt(f"{layout}: {file}", f"seed {number}", partial(use, folder))


def test_nested_values_of_a_config(faults: Faults, folders, tmp_path) -> None:
    """Odd values exactly where parts, planners and connectors are described."""
    raw = json.loads((folders["own"] / "config.json").read_text())
    places = ["media", "connector", "text_config", "vision_config", "vision_feature_layer", "extra_encoders"]
    for number in range(120):
        rng = random.Random(number)
        key = rng.choice(places)
        changed = raw | {key: rng.choice(ODD) if rng.random() < 0.3 else twist(raw[key], rng)}
        content = json_text(changed).encode()
        folder = damaged(folders["own"], tmp_path / str(number), "config.json", content)
        faults.attempt("own: nested values", f"seed {number}", partial(use, folder))
        faults.attempt("inspect: nested values", f"seed {number}", partial(inspect_model, folder))


def test_weights(faults: Faults, folders, tmp_path) -> None:
    data = (folders["own"] / "model.safetensors").read_bytes()
    for number in range(80):
        rng = random.Random(number)
        content = scramble(data, rng)
        folder = damaged(folders["own"], tmp_path / str(number), "model.safetensors", content)
        faults.attempt("own: model.safetensors", f"seed {number}", partial(use, folder))


def test_pickles(faults: Faults, tmp_path) -> None:
    source, encoder = write_classic(tmp_path)
    file = "pytorch_model-00002-of-00002.bin"
    data = (source / file).read_bytes()
    for number in range(60):
        folder = damaged(source, tmp_path / str(number), file, scramble(data, random.Random(number)))
        read: Callable[[], object] = partial(lambda place: build(open_checkpoint(place, vision_tower=encoder)), folder)
        faults.attempt("original: pickled weights", f"seed {number}", read)


def test_weight_maps(faults: Faults, folders, tmp_path) -> None:
    state = load_file(folders["own"] / "model.safetensors")
    source = tmp_path / "sharded"
    source.mkdir()
    for path in folders["own"].iterdir():
        if path.name != "model.safetensors":
            (source / path.name).symlink_to(path)
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: state[name] for name in own}, source / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in halves.items() for name in own}}
    for number in range(80):
        content = scrambled_json(index, random.Random(number))
        folder = damaged(source, tmp_path / str(number), "model.safetensors.index.json", content)
        faults.attempt("own: weight maps", f"seed {number}", partial(use, folder))


def test_tokenizers(faults: Faults, folders, tmp_path) -> None:
    data = (folders["own"] / "tokenizer.json").read_bytes()
    for number in range(60):
        rng = random.Random(number)
        content = scramble(data, rng) if number % 2 else json_text(twist(json.loads(data), rng)).encode()
        folder = damaged(folders["own"], tmp_path / str(number), "tokenizer.json", content)
        faults.attempt(
            "own: tokenizer.json", f"seed {number}", lambda folder=folder: load_processor(open_checkpoint(folder))
        )


def test_json_texts(faults: Faults) -> None:
    value = {"a": [1, 2.5, None, True, "x\u00e9"], "b": {"c": {"d": [[]]}}, "e": 10**20}
    for number in range(1000):
        content = scrambled_json(value, random.Random(number))
        faults.attempt("JSON texts", f"seed {number}", partial(parse_json, content))
