"""Preference records, the objective `dpo`, and its agreement with TRL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from rich.console import Console
from safetensors.torch import load_file

from llavakit.data.preference import read_preference
from llavakit.data.records import Record
from llavakit.errors import RecipeError, RecordError, UserError
from llavakit.training.build import build_model
from llavakit.training.objectives.base import Step
from llavakit.training.objectives.dpo import DPO, answers_of, pair_of
from llavakit.training.objectives.preference import Pairs, pair_losses, sequence_logps
from llavakit.training.recipe import parse_recipe
from llavakit.training.run import TrainResult, train
from llavakit.training.trainer import StageTrainer

QUIET = Console(quiet=True)
LOG2 = math.log(2)
STAGE = {
    "name": "learn",
    "train": ["multi_modal_projector", "language_model", "lm_head"],
    "objective": {"type": "dpo", "beta": 0.2},
    "batch_size": 4,
    "max_steps": 4,
    "log_steps": 1,
    "learning_rate": 3e-3,
    "schedule": "constant",
    "warmup": 0,
}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs about coloured squares; answers differ in length, some prompts have no picture."""
    folder = tiny_training.write_world(tmp_path_factory.mktemp("preference"))
    colours, pairs = list(tiny_training.COLOURS), []
    for record in json.loads((folder / "records.json").read_text()):
        right = record["conversations"][1]["value"].split()[-1]
        wrong = colours[(colours.index(right) + 1) % 4]
        answers = {"chosen": f"the square is {right}", "rejected": f"the square is left it is {wrong}"}
        own = {"image": record["image"]} if "image" in record else {}
        pairs.append({"prompt": record["conversations"][0]["value"], **answers, **own})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def recipe(world: Path, out: Path, *stages: dict[str, Any], pairs: str = "pairs.jsonl", **keys: Any) -> Any:
    raw = tiny_training.recipe(world, output=str(out), **keys)
    raw["data"] = [{"path": str(world / pairs), "images": str(world / "images"), "name": "pairs"}]
    raw["data"].append({"path": str(world / "records.json"), "images": str(world / "images"), "name": "records"})
    raw["stages"] = [{"data": ["pairs"], **STAGE, **stage} for stage in stages or ({},)]
    return parse_recipe(raw)


def log(result: TrainResult, key: str, stage: int = -1) -> list[float]:
    return [entry[key] for entry in result.stages[stage].metrics["log"]]


def prepared(world: Path, **objective: Any) -> tuple[DPO, Any, list[dict[str, Any]]]:
    """The objective with a fresh model in double precision, and samples of five pairs."""
    made = recipe(world, world / "never", {"objective": {"type": "dpo", **objective}})
    model, processor = build_model(made)
    model = model.double().eval()
    found = DPO(made.stages[0])
    found.bind(model.config, processor)
    lines = (world / "pairs.jsonl").read_text().splitlines()[:5]
    records = [
        read_preference(json.loads(line), "pairs.jsonl", number, media_root=world / "images")
        for number, line in enumerate(lines)
    ]
    return found, model, [found.check(found.encode(record), record) for record in records]


# Records


@pytest.fixture
def picture(world: Path) -> dict[str, Any]:
    return {"media_root": world / "images"}


USER = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("raw", "kinds", "text"),
    [
        ({"prompt": "What?", "image": "0.png"}, ["image", "text"], "\nWhat?"),
        ({"prompt": "<image>\nWhat?", "image": "0.png"}, ["image", "text"], "\nWhat?"),
        ({"prompt": "Left <image> or right <image>?", "images": ["0.png", "1.png"]}, None, "Left  or right ?"),
        ({"prompt": "Count <image> <image> all", "image": "0.png"}, ["image", "text"], "\nCount   all"),
        ({"prompt": [USER], "images": ["0.png"]}, ["image", "text"], "\nWhat?"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}],
          "images": ["0.png"]}, ["image", "text"], "a"),
        ({"prompt": "What?"}, ["text"], "What?"),
    ],
)  # fmt: skip
def test_forms_of_records(picture, raw, kinds, text):
    for answers in ({"chosen": "yes", "rejected": "no"}, {"chosen": [ANSWER], "rejected": ANSWER | {"content": "no"}}):
        record = read_preference(raw | answers, "f.jsonl", 3, **picture)
        content = record.messages[0]["content"]
        if kinds is not None:
            assert [part["type"] for part in content] == kinds
        assert "".join(part["text"] for part in content if part["type"] == "text") == text
        assert (record.chosen, record.rejected) == ("yes", "no")
        assert all(Path(part["image"]).is_file() for part in content if part["type"] == "image")


def test_a_prompt_that_both_conversations_share(picture):
    raw = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "no"}], "image": "0.png"}
    record = read_preference(raw, **picture)
    assert [part["type"] for part in record.messages[0]["content"]] == ["image", "text"]
    raw["rejected"][0] = USER | {"content": "Who?"}
    with pytest.raises(RecordError, match="rejected: must be the same conversation as chosen up to its last turn"):
        read_preference(raw, **picture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "f.jsonl:3: rejected: is missing"),
        ({"chosen": 5}, "f.jsonl:3: chosen: must be a text or one message"),
        ({"chosen": [ANSWER, USER]}, "f.jsonl:3: chosen: must be a text or one message"),
        ({"chosen": [USER]}, "f.jsonl:3: chosen: must be a message of the assistant, not of 'user'"),
        ({"chosen": [ANSWER | {"content": [{"type": "image", "image": "1.png"}]}]}, "f.jsonl:3: chosen: holds media"),
        ({"prompt": 4}, "f.jsonl:3: prompt: must be a text or a list"),
        ({"prompt": [USER, ANSWER]}, "f.jsonl:3: prompt: ends with a turn of the assistant"),
        ({"prompt": "<image> a", "image": ["0.png", "1.png"]}, "f.jsonl:3: prompt: has 1 marks for 2 media"),
        ({"images": ["1.png"]}, "f.jsonl:3: images: the record has image too"),
        ({"image": "none.png"}, "there is no file"),
        ({"tools": ["x"]}, "f.jsonl:3: tools: function calls"),
        ({"label": True}, "f.jsonl:3: label: is of unpaired preferences"),
    ],
)
def test_broken_records(picture, change, message):
    raw = {"prompt": "What?", "chosen": "yes", "rejected": "no", "image": "0.png"} | change
    with pytest.raises(RecordError, match=message):
        read_preference(raw, "f.jsonl", 3, **picture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "the square is red", "chosen": "the square is red"}, r"b.jsonl:2: rejected: is the same answer"),
        ({"chosen": " "}, r"b.jsonl:2: chosen: the answer is empty"),
        ({"prompt": "what " * 150}, r"b.jsonl:2: record: prompt and answer take \d+ tokens, max_length is 160"),
    ],
)
def test_pairs_that_teach_nothing_are_refused_before_the_first_step(world, tmp_path, change, message):
    lines = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()[:3]]
    lines[1] |= change
    (world / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecordError, match=message):
        train(recipe(world, tmp_path / "run", {"max_length": 160}, pairs="b.jsonl"), console=QUIET)
    assert not (tmp_path / "run" / "learn").exists()


def test_keys_that_mean_nothing_here_are_refused(world, tmp_path):
    with pytest.raises(RecipeError, match=r"stages.0.loss_weights.text: objective 'dpo' has weight and sft"):
        train(recipe(world, tmp_path / "run", {"loss_weights": {"text": 2.0}}), console=QUIET)
    with pytest.raises(RecipeError, match="loss"):
        recipe(world, tmp_path / "run", {"objective": {"type": "dpo", "loss": "sigmoyd"}})


# Layouts


def test_a_pair_and_its_answers():
    chosen = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5], "visual_modalities": []}
    rejected = {"input_ids": [1, 2, 3, 7], "labels": [-100, -100, 3, 7], "visual_modalities": []}
    pair = pair_of(chosen, rejected)
    assert pair["fork"] == (3, 5)
    assert pair["input_ids"].tolist() == [1, 2, 3, 4, 5, 7]
    for row, sample in zip(answers_of(pair), (chosen, rejected), strict=True):
        assert row["input_ids"].tolist() == sample["input_ids"]
        assert row["labels"].tolist() == sample["labels"]
    shorter = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "visual_modalities": []}
    assert pair_of(chosen, shorter)["fork"] == (3, 5)  # each answer keeps a token of its own


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "kto_pair"])
def test_forks_and_rows_give_the_same_loss_and_gradients(world, loss):
    objective, model, samples = prepared(world, loss=loss, sft=0.5)
    torch.manual_seed(1)
    objective.reference = {sample["key"]: tuple(torch.randn(2).sub(20).tolist()) for sample in samples}
    found = {}
    for forked in (False, True):
        objective.use(model)
        assert objective.forked
        objective.forked = forked
        batch = objective._collator()(samples)
        model.zero_grad()
        result = objective.loss(model, batch, Step(torch.tensor(len(samples)), 1))
        result.value.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[forked] = (result.value.detach(), gradients, {k: float(v) for k, v in result.logged.items()})
        rows = batch["input_ids"].shape[0]
        assert rows == (1 if forked else 2 * len(samples))
        pictures = sum(len(sample["pixel_values"]) for sample in samples)
        assert len(batch["pixel_values"]) == (pictures if forked else 2 * pictures)
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[True][1], found[False][1], atol=1e-6, rtol=1e-6)
    assert found[True][2] == pytest.approx(found[False][2], abs=1e-4)


def test_log_probabilities_are_those_of_each_answer_alone(world):
    objective, model, samples = prepared(world)
    objective.use(model)
    with torch.no_grad():
        together = objective.logps(model, objective._collator()(samples))[0]
        for number, sample in enumerate(samples):
            for answer, row in enumerate(answers_of(sample)):
                inputs = {"input_ids": row["input_ids"][None]}
                if len(row["pixel_values"]):
                    inputs["pixel_values"] = torch.stack(row["pixel_values"]).double()
                    inputs["visual_sizes"] = torch.tensor(row["visual_sizes"])
                    inputs["visual_modalities"] = torch.tensor(row["visual_modalities"])
                alone = sequence_logps(model(**inputs).logits, row["labels"][None])
                torch.testing.assert_close(together[answer * 5 + number], alone[0], atol=1e-4, rtol=1e-5)


def test_losses_that_are_known():
    pairs = Pairs(*(torch.tensor([value]) for value in (-3.0, -4.0, -3.5, -3.5)))
    losses, chosen, rejected = pair_losses(pairs, beta=0.5)
    assert losses.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5))))
    assert (chosen.item(), rejected.item()) == (0.25, -0.25)
    same = Pairs(*(torch.tensor([-3.0, -9.0]) for _ in range(4)))
    assert pair_losses(same)[0].tolist() == pytest.approx([LOG2, LOG2])
    assert pair_losses(same, "kto_pair")[0].tolist() == [0.5] * 4
    swapped = Pairs(pairs[1], pairs[0], pairs[3], pairs[2])
    smoothed = pair_losses(pairs, label_smoothing=0.25)[0]
    assert smoothed.item() == pytest.approx(
        0.75 * losses.item() + 0.25 * pair_losses(swapped, beta=0.1)[0].item(), abs=1
    )


# Training


def test_training_starts_at_log_2_and_learns_the_preference(world, tmp_path):
    result = train(recipe(world, tmp_path / "run", {"max_steps": 12}), console=QUIET)
    losses, margins = log(result, "loss"), log(result, "reward_margin")
    assert losses[0] == pytest.approx(LOG2, abs=1e-5)
    assert (log(result, "reward_chosen")[0], log(result, "reward_rejected")[0]) == pytest.approx((0, 0), abs=1e-5)
    assert losses[-1] < 0.6 < losses[0]
    assert margins[-1] > 0.2
    assert log(result, "reward_accuracy")[-1] == 1.0
    kept = load_file(result.stages[0].folder / "reference.safetensors")
    assert kept["logps"].shape == (24, 2)


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_stage_refers_to_what_it_started_from(world, tmp_path, lora, monkeypatch):
    """A supervised stage, then two preference stages: each starts at log 2, and a killed one finds its reference."""
    first = {"name": "tune", "data": ["records"], "objective": "supervised", "max_steps": 3}
    stages = [first, {"name": "one", "max_steps": 2}, {"name": "two", "max_steps": 3, "save_steps": 1}]
    if lora is not None:
        stages = [stage | {"train": {}, "lora": lora} for stage in stages]
    whole = train(recipe(world, tmp_path / "whole", *stages), console=QUIET)
    for stage in (1, 2):
        assert log(whole, "loss", stage)[0] == pytest.approx(LOG2, abs=1e-5)
        assert log(whole, "loss", stage)[-1] != pytest.approx(LOG2, abs=1e-5)
    original = StageTrainer.training_step

    def stop(self: StageTrainer, *args: Any) -> Any:
        if self.stage.name == "two" and self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(StageTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(world, tmp_path / "cut", *stages), console=QUIET)
    monkeypatch.undo()
    (tmp_path / "cut" / "two" / "reference.safetensors").unlink()  # it is computed again, from the start of the stage
    resumed = train(recipe(world, tmp_path / "cut", *stages), console=QUIET)
    assert log(resumed, "loss")[-1] == pytest.approx(log(whole, "loss")[-1], abs=1e-6)


def test_a_run_that_goes_on_from_an_unmerged_adapter_refers_to_the_model_with_it(world, tmp_path):
    first = {"name": "tune", "data": ["records"], "objective": "supervised", "train": {}, "max_steps": 3}
    made = train(recipe(world, tmp_path / "one", first | {"lora": LORA | {"merge": False}}), console=QUIET)
    raw = recipe(world, tmp_path / "two", {"train": {}, "lora": LORA, "max_steps": 2}).model_dump()
    result = train(parse_recipe(raw | {"parts": None, "model": str(made.final)}), console=QUIET)
    assert log(result, "loss")[0] == pytest.approx(LOG2, abs=1e-5)
    assert log(result, "loss")[1] != pytest.approx(LOG2, abs=1e-5)


@pytest.mark.parametrize("objective", [{"loss": "ipo"}, {"loss": "hinge", "sft": 1.0}, {"reference_free": True}])
def test_packed_rows_and_other_losses_train(world, tmp_path, objective):
    stage = {"packing": True, "max_length": 160, "batch_size": 2, "objective": {"type": "dpo", **objective}}
    result = train(recipe(world, tmp_path / "run", stage), console=QUIET)
    losses = log(result, "dpo_loss")
    assert all(math.isfinite(value) for value in losses)
    expected = {"ipo": 25.0, "hinge": 1.0}.get(objective.get("loss"))
    if expected is not None:
        assert losses[0] == pytest.approx(expected, abs=1e-4)
    assert (result.stages[0].folder / "reference.safetensors").exists() != objective.get("reference_free", False)


def test_another_record_is_no_preference(world):
    objective, _, _ = prepared(world)
    with pytest.raises(Exception, match="a preference record is needed"):
        objective.encode(Record([], "a", 1, {}))


def test_a_pair_without_a_reference_is_no_pair_with_a_reference_of_zero(world):
    objective, model, samples = prepared(world)
    objective.use(model)
    objective.reference = {}
    with pytest.raises(UserError, match="has no reference; start again"):
        objective.loss(model, objective._collator()(samples), Step(torch.tensor(len(samples)), 1))
