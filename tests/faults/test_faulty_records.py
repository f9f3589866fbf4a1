"""Malformed data files and records: readers, records, samples, lists of files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import yaml
from harness import Faults
from mutations import ODD, scramble, scrambled_json, twist

from llavakit.data.dataset import SampleDataset
from llavakit.data.mixture import Mixture
from llavakit.data.readers import ListSource
from llavakit.training.build import build_processor, config_of
from llavakit.training.recipe import parse_recipe

LLAVA = {
    "id": "7",
    "image": "1.png",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat colour is the square ?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "is it here ?"},
        {"from": "gpt", "value": "yes"},
    ],
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "a helpful assistant"},
        {"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "what colour ?"}]},
        {"role": "assistant", "content": "red"},
    ],
}
SWIFT = {
    "messages": [{"role": "user", "content": "<image>what colour ?"}, {"role": "assistant", "content": "red"}],
    "images": ["1.png"],
    "system": "a helpful assistant",
}
FORMS = {"LLaVA's": LLAVA, "OpenAI's": OPENAI, "ms-swift's": SWIFT}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.write_world(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def encode(world: Path) -> Any:
    recipe = parse_recipe(tiny_training.recipe(world))
    return build_processor(recipe, config_of(recipe)).encode


def use(source: Any, world: Path, encode: Any) -> None:
    """Every sample of a source, and no broken one passes."""
    samples = SampleDataset(Mixture(source, media_root=world / "images"), encode)
    for index in range(len(samples)):
        samples[index]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_files_of_records(faults: Faults, world: Path, encode: Any, tmp_path: Path, form: str, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    for seed in range(150):
        rng = random.Random(f"{form} {suffix} {seed}")
        lines = [scrambled_json(FORMS[form], rng), json.dumps(FORMS[form]).encode()]
        path.write_bytes(b"[" + b",\n".join(lines) + b"]" if suffix == "json" else b"\n".join(lines))
        faults.attempt(f"records in a .{suffix}", f"{form} {seed}", lambda: use(str(path), world, encode))


def test_scrambled_files(faults: Faults, world: Path, encode: Any, tmp_path: Path) -> None:
    whole = {
        "json": json.dumps([LLAVA, OPENAI, SWIFT], indent=1).encode(),
        "jsonl": b"\n".join(json.dumps(record).encode() for record in FORMS.values()),
    }
    for suffix, data in whole.items():
        path = tmp_path / f"data.{suffix}"
        for seed in range(200):
            path.write_bytes(scramble(data, random.Random(f"{suffix} {seed}")))
            faults.attempt("damaged data files", f"{suffix} {seed}", lambda p=path: use(str(p), world, encode))


def test_records_in_memory(faults: Faults, world: Path, encode: Any) -> None:
    for form, record in FORMS.items():
        for seed in range(150):
            twisted = twist(record, random.Random(f"{form} {seed}"))
            label = f"{form} {seed}"
            faults.attempt(
                "records in memory", label, lambda raw=twisted: use({"path": ListSource([raw])}, world, encode)
            )


def test_every_field_with_every_odd_value(faults: Faults, world: Path, encode: Any) -> None:
    for number, odd in enumerate(ODD):
        for key in ("image", "video", "volume", "images", "conversations", "system", "id"):
            label = f"{key} = odd value {number}"
            raw = LLAVA | {key: odd}
            faults.attempt(
                "odd values in fields", label, lambda raw=raw: use({"path": ListSource([raw])}, world, encode)
            )


def test_lists_of_files(faults: Faults, world: Path, encode: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([LLAVA]))
    entry = {"json_path": "a.json", "sampling_strategy": "first:1", "weight": 1.0}
    path = tmp_path / "mix.yaml"
    for seed in range(200):
        rng = random.Random(f"list {seed}")
        if rng.random() < 0.5:
            data = scramble(yaml.safe_dump({"datasets": [entry]}).encode(), rng)
        else:
            data = scrambled_json(twist({"datasets": [entry]}, rng), rng)
        path.write_bytes(data)
        faults.attempt("YAML lists of data", f"seed {seed}", lambda: use(str(path), world, encode))
