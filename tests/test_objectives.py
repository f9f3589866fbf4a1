"""Objectives by name: an encoder alone, pairs that share a prompt, and what a recipe may say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionModel

from llavakit.conversation.messages import FieldError
from llavakit.data.records import Record, belongs_to, read_record
from llavakit.errors import RecipeError, RecordError
from llavakit.registry import OBJECTIVES
from llavakit.splice.scatter import IGNORE
from llavakit.training.build import build_model
from llavakit.training.dataset import Failure, StageCollator, sample_index
from llavakit.training.objectives import Loss, Run, Step
from llavakit.training.objectives.encoder import EncoderObjective
from llavakit.training.objectives.language import LanguageObjective
from llavakit.training.recipe import ObjectiveOptions, parse_recipe
from llavakit.training.run import TrainResult, train
from llavakit.training.trainer import StageTrainer

QUIET = Console(quiet=True)


class DistanceOptions(ObjectiveOptions):
    noise: float = 0.1


class EmbeddingDistance(EncoderObjective):
    """Embeddings of noisy images stay near those that the encoder gave when the stage began."""

    Options = DistanceOptions

    def begin(self, run: Run) -> None:
        self.frozen = run.start()[0].eval().requires_grad_(False)

    def loss(self, model: nn.Module, batch: dict[str, Any], step: Step) -> Loss:
        pixels = batch["pixel_values"]
        wanted = self.frozen(pixels).pooler_output
        found = model(pixels + self.options.noise * torch.randn_like(pixels)).pooler_output
        distance = (found - wanted).square().sum(-1)
        return Loss(distance.sum() / step.items, {"distance": distance.detach().mean()})


class PairCollator:
    """Both answers of every pair, one after another, and which of them each position belongs to."""

    def __init__(self, inner: StageCollator) -> None:
        self.inner = inner

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any] | Failure:
        failed = next((sample for sample in samples if isinstance(sample, Failure)), None)
        if failed is not None:
            return failed
        answers = [sample[name] for sample in samples for name in ("chosen", "rejected")]
        return self.inner(answers) | {"answer": sample_index(self.inner, answers), "pairs": len(samples)}


class PairOptions(ObjectiveOptions):
    beta: float = 0.5


class PairMargin(LanguageObjective):
    """The chosen answer is likelier than the rejected one."""

    Options = PairOptions

    def read(self, raw: Any, file: str, line: int, **options: Any) -> Record:
        with belongs_to(file, line):
            for key in ("prompt", "chosen", "rejected"):
                if not isinstance(raw.get(key), str):
                    raise FieldError(key, "must be a string")
        turns = [{"from": "human", "value": raw["prompt"]}, {"from": "gpt", "value": raw["chosen"]}]
        entry = {"conversations": turns} | ({"image": raw["image"]} if "image" in raw else {})
        found = read_record(entry, file, line, **options)
        return Record(found.messages, file, line, raw)

    def encode(self, record: Record, *, media: bool = True) -> dict[str, Any]:
        pair = {}
        for name in ("chosen", "rejected"):
            answer = {"role": "assistant", "content": [{"type": "text", "text": record.raw[name]}]}
            one = Record([*record.messages[:-1], answer], record.file, record.line, record.raw)
            pair[name] = self.conversations.check(self.conversations.encode(one, media=media), record)
        return pair

    def check(self, sample: dict[str, Any], record: Record) -> dict[str, Any]:
        longest = self.stage.max_length
        if longest is not None and abs(self.length(sample)) > longest:
            raise RecordError(record.file, record.line, "record", f"the pair does not fit max_length {longest}")
        return sample

    def length(self, sample: Mapping[str, Any]) -> int:
        return sum(self.conversations.length(sample[name]) for name in ("chosen", "rejected"))

    def size(self, sample: Mapping[str, Any]) -> int:
        return sum(self.conversations.size(sample[name]) for name in ("chosen", "rejected"))

    def collator(self, run: Run) -> Callable[[Sequence[Any]], Any]:
        return PairCollator(super().collator(run))

    def items(self, batch: Mapping[str, Any]) -> int:
        return batch["pairs"]

    def loss(self, model: nn.Module, batch: dict[str, Any], step: Step) -> Loss:
        inputs = dict(batch)
        answer, pairs, labels = inputs.pop("answer"), inputs.pop("pairs"), inputs.pop("labels")
        logits = self.forward(model, inputs).logits
        targets, owner = labels[:, 1:], answer[:, 1:]
        counts = (targets != IGNORE) & (owner >= 0)
        chances = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        sums = torch.zeros(2 * pairs).index_add(0, owner[counts], chances[counts]).view(pairs, 2)
        margins = sums[:, 0] - sums[:, 1]
        value = -F.logsigmoid(self.options.beta * margins).sum() / step.items
        return Loss(value, {"margin": margins.detach().mean(), "accuracy": (margins > 0).float().mean()})


OBJECTIVES.add("test_embedding_distance", EmbeddingDistance)
OBJECTIVES.add("test_pair_margin", PairMargin)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_training.write_world(tmp_path_factory.mktemp("objectives"))
    colours = list(tiny_training.COLOURS)
    pairs, images = [], []
    for number, record in enumerate(json.loads((folder / "records.json").read_text())):
        right = record["conversations"][1]["value"].split()[-1]
        wrong = colours[(colours.index(right) + 1) % 4]
        answers = {"chosen": f"the square is {right}", "rejected": f"it is {wrong}"}
        own = {"image": record["image"]} if "image" in record else {}
        pairs.append({"prompt": record["conversations"][0]["value"], **answers, **own})
        if own:
            images.append({**own, "label": number})
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "images.json").write_text(json.dumps(images))
    return folder


def run(world: Path, out: Path, file: str, stage: dict[str, Any], console: Console = QUIET, **keys: Any) -> TrainResult:
    raw = tiny_training.recipe(world, output=str(out), **keys)
    raw["data"] = [{"path": str(world / file), "images": str(world / "images")}]
    base = {"name": "learn", "batch_size": 4, "max_steps": 6, "log_steps": 1, "learning_rate": 3e-3}
    raw["stages"] = [base | stage]
    return train(parse_recipe(raw), console=console)


def cut(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the next run before a step."""
    whole = StageTrainer.training_step

    def stop(self: StageTrainer, *args: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(StageTrainer, "training_step", stop)


def curve(result: TrainResult, key: str = "loss") -> list[float]:
    return [entry[key] for entry in result.stages[0].metrics["log"]]


ENCODER = {"train": ["all"], "objective": {"type": "test_embedding_distance", "noise": 0.5}, "save_steps": 2}
PAIRS = {
    "train": ["multi_modal_projector", "language_model", "lm_head"],
    "objective": "test_pair_margin",
    "packing": True,
    "max_length": 160,
    "batch_size": 2,
    "save_steps": 2,
}


def encoder_parts(world: Path) -> dict[str, Any]:
    parts = tiny_training.recipe(world)["parts"]
    return {"vision_config": parts["vision_config"], "media": parts["media"]}


def test_an_encoder_trains_alone_and_goes_on_after_a_kill(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = encoder_parts(world)
    whole = run(world, tmp_path / "whole", "images.json", ENCODER, parts=parts)
    cut(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "cut", "images.json", ENCODER, parts=parts)
    monkeypatch.undo()
    assert (tmp_path / "cut" / "learn" / "checkpoint-4").is_dir()
    rest = run(world, tmp_path / "cut", "images.json", ENCODER, parts=parts)
    assert curve(rest) == curve(whole)
    first, second = (load_file(result.final / "model.safetensors") for result in (whole, rest))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert curve(whole, "distance") == pytest.approx(curve(whole), rel=1e-5)
    assert min(curve(whole)) > 0
    assert whole.stages[0].metrics["tokens"] == 6 * 4 * 9  # features of a 3 x 3 grid

    # what is left is an encoder that transformers reads, and that another recipe starts from
    assert not any(name.startswith("language_model") for name in first)
    read = CLIPVisionModel.from_pretrained(whole.final).state_dict()
    assert all(torch.equal(read[name], first[name]) for name in first)
    raw = tiny_training.recipe(world)
    raw["parts"]["init"] = {"vision_tower": str(whole.final)}
    model, _ = build_model(parse_recipe(raw))
    weight = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(model.model.vision_tower.state_dict()[weight], first[weight])


def test_a_second_stage_goes_on_with_the_encoder_of_the_first(world: Path, tmp_path: Path) -> None:
    raw = tiny_training.recipe(world, output=str(tmp_path), parts=encoder_parts(world))
    raw["data"] = [{"path": str(world / "images.json"), "images": str(world / "images")}]
    base = {**ENCODER, "learning_rate": 1e-3, "max_steps": 1}
    frozen = {"all": True, "embeddings": False}
    raw["stages"] = [{**base, "name": "one"}, {**base, "name": "two", "train": frozen}]
    result = train(parse_recipe(raw), console=QUIET)
    one, two = (load_file(stage.folder / "final" / "model.safetensors") for stage in result.stages)
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed
    assert not any(name.startswith("embeddings") for name in changed)


def test_pairs_train_in_packed_rows_with_cached_features_and_go_on_after_a_kill(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = PAIRS | {"cache_features": True}
    said = StringIO()
    whole = run(world, tmp_path / "whole", "pairs.json", stage, Console(file=said, width=200))
    assert "learn: step 6 of 6, loss" in said.getvalue()
    cut(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "cut", "pairs.json", stage)
    monkeypatch.undo()
    rest = run(world, tmp_path / "cut", "pairs.json", stage)
    assert curve(rest) == curve(whole)
    first, second = (load_file(result.final / "model.safetensors") for result in (whole, rest))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert curve(whole, "margin")[-1] > curve(whole, "margin")[0]
    assert set(curve(whole, "accuracy")) <= {number / 4 for number in range(5)} | {1 / 3, 2 / 3}


def test_pairs_have_the_same_loss_packed_padded_and_one_by_one(world: Path, tmp_path: Path) -> None:
    one = {"max_steps": 1, "max_length": 400}
    ways = {
        "packed": {"batch_size": 6},
        "padded": {"packing": False, "batch_size": 6},
        "one by one": {"packing": False, "batch_size": 1, "accumulation": 6},
        "adapters": {"batch_size": 6, "lora": {"rank": 2, "dropout": 0.0}, "train": ["multi_modal_projector"]},
    }
    losses = {
        name: curve(run(world, tmp_path / name, "pairs.json#6", PAIRS | one | way))[0] for name, way in ways.items()
    }
    assert list(losses.values()) == pytest.approx([losses["packed"]] * 4, abs=1e-5)
    assert losses["packed"] != pytest.approx(0.6931, abs=1e-3)


def test_both_answers_share_their_prompt(world: Path) -> None:
    recipe = parse_recipe(tiny_training.recipe(world, stages=[PAIRS | {"name": "learn", "learning_rate": 1.0}]))
    objective = PairMargin(recipe.stages[0])
    objective.bind(*objective.describe(recipe))
    raw = json.loads((world / "pairs.json").read_text())[0]
    pair = objective.encode(objective.read(raw, str(world / "pairs.json"), 1, media_root=world / "images"))
    ids: list[Tensor] = [pair[name]["input_ids"] for name in ("chosen", "rejected")]
    begin = min(int((pair[name]["labels"] != IGNORE).nonzero()[0]) for name in pair)
    assert begin > 9
    assert torch.equal(ids[0][:begin], ids[1][:begin])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": None}, "pairs.json:1: prompt: must be a string"),
        ({"chosen": "the square is " + "red " * 200}, "pairs.json:1: record: the pair does not fit max_length 160"),
        ({"image": "none.png"}, "none.png"),
    ],
)
def test_a_broken_pair_is_one_line_before_the_first_step(
    world: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    pairs = json.loads((world / "pairs.json").read_text())
    pairs[0] |= change
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    with pytest.raises(RecordError, match=said):
        run(world, tmp_path / "run", str(tmp_path / "pairs.json"), PAIRS)
    assert not (tmp_path / "run" / "learn").exists()


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            {"objective": "supervisd"},
            "objective.type: unknown training objective 'supervisd'; did you mean 'supervised'?",
        ),
        ({"objective": {"type": "test_pair_margin", "bta": 1}}, "objective.bta: unknown key; did you mean 'beta'?"),
        ({"objective": {"type": "test_pair_margin", "beta": "x"}}, "objective.beta: should be a number, not 'x'"),
        ({"objective": {"type": ["x"]}}, "objective.type"),
        ({"objective": {"beta": 1}}, "objective.beta: unknown key"),
        ({"objective": 3}, "objective"),
        (ENCODER | {"template": "plain"}, "stages.0.template: objective 'test_embedding_distance' does not use it"),
        (ENCODER | {"lora": True}, "stages.0.lora: objective 'test_embedding_distance' does not use it"),
        (ENCODER | {"train": {"embeddings": {"rows": ["red"]}}}, "rows"),
        (ENCODER | {"train": ["vision_tower"]}, "the model has no such part"),
    ],
)
def test_what_a_stage_says_of_its_objective_is_checked(
    world: Path, tmp_path: Path, stage: dict[str, Any], said: str
) -> None:
    keys = (
        {"parts": encoder_parts(world)} if "objective" in stage and stage["objective"] == ENCODER["objective"] else {}
    )
    with pytest.raises(RecipeError) as caught:
        run(world, tmp_path, "images.json", {"train": ["multi_modal_projector"]} | stage, **keys)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stages_of_one_recipe_train_the_same_kind_of_module(world: Path, tmp_path: Path) -> None:
    raw = tiny_training.recipe(world, output=str(tmp_path))
    raw["stages"][1] |= {"objective": ENCODER["objective"], "train": ["all"]}
    with pytest.raises(RecipeError, match=r"stages\.1\.objective: .* trains another kind of module \(encoder\)"):
        train(parse_recipe(raw), console=QUIET)


def test_an_objective_is_part_of_what_a_run_was_made_of(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path, "pairs.json", PAIRS | {"max_steps": 1})
    other = {"objective": {"type": "test_pair_margin", "beta": 0.7}, "max_steps": 1}
    with pytest.raises(RecipeError, match=r"was made by a recipe with another `stages\.learn`"):
        run(world, tmp_path, "pairs.json", PAIRS | other)
