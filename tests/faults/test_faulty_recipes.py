"""Malformed recipes and overrides: read, validated, and checked as far as it goes without a step of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import yaml
from harness import Faults
from mutations import ODD, json_text, scramble, twist

from llavakit.training.check import check_recipe
from llavakit.training.recipe import load_recipe, parse_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.write_world(tmp_path_factory.mktemp("squares"))


def small(raw: Any, overrides: tuple[str, ...] = ()) -> None:
    """Validate, and check everything before the first step unless an odd size makes a huge model."""
    recipe = parse_recipe(raw, overrides)
    parts = recipe.parts
    sizes = json.dumps([parts.text_config, parts.vision_config, parts.connector, parts.media]) if parts else "999999"
    if not any(len(word) > 4 for word in _numbers(sizes)):
        check_recipe(recipe, range(len(recipe.stages)))


def _numbers(text: str) -> list[str]:
    return "".join(letter if letter.isdigit() else " " for letter in text).split()


def test_damaged_files(faults: Faults, world: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    whole = yaml.safe_dump(tiny_training.recipe(world)).encode()
    for seed in range(300):
        path.write_bytes(scramble(whole, random.Random(f"file {seed}")))
        faults.attempt("damaged recipes", f"seed {seed}", lambda: load_recipe(path))


def test_odd_values(faults: Faults, world: Path) -> None:
    for seed in range(250):
        raw = twist(tiny_training.recipe(world), random.Random(f"values {seed}"))
        faults.attempt("recipes with odd values", f"seed {seed}", lambda raw=raw: small(raw))


def test_every_key_of_a_stage_with_every_odd_value(faults: Faults, world: Path) -> None:
    from llavakit.training.recipe import Stage

    for key in Stage.model_fields:
        for number, odd in enumerate(ODD):
            raw = tiny_training.recipe(world)
            raw["stages"][1][key] = odd
            label = f"{key} = odd value {number}"
            faults.attempt("stages with odd values", label, lambda raw=raw: parse_recipe(raw))


def test_overrides(faults: Faults, world: Path) -> None:
    raw = tiny_training.recipe(world)
    places = ("stages.0.train", "stages.tune.seed", "data.0", "data.-1.weight", "parts.media.image", "stages", "")
    keys = ("", ".x", ".0", ".train.language_model", ".name", ".²", ".-9", "." * 50)
    for place in places:
        for key in keys:
            for number, odd in enumerate(ODD[:30]):
                text = f"{place}{key}={json_text(odd)}"
                label = f"{place}{key} = odd value {number}"
                faults.attempt("overrides", label, lambda text=text: parse_recipe(raw, [text]))
