"""LLaVA-Critic: golden figures, replies of judges, benchmarks with a judge that runs here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.conversation.turns import TextDelta
from llavakit.errors import UserError
from llavakit.evaluation.judges import Judge
from llavakit.evaluation.rewards import best_and_worst, pairwise_rewards
from llavakit.evaluation.score import score
from llavakit.generation.remote import CallFailed
from llavakit.generation.responder import Responder
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.llava_critic import verdicts
from llavakit.systems.llava_critic.benchmarks import joint_verdict
from llavakit.systems.llava_critic.miniature_judge import pearson, tau
from llavakit.systems.llava_critic.prompts import judge_messages, pointwise_prompt
from llavakit.training.build import build_meta
from llavakit.training.lora import prepare
from llavakit.training.parameter_groups import trainable_by_part
from llavakit.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")

GOLDEN = Path(__file__).parent / "golden" / "llava-critic"
NASTY = ["", "\n", " ", "[[", "nan", "Score: nan", "{" * 500, "9" * 5000, "\x00", "Answer is better", "'score'", "()"]


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


@pytest.mark.parametrize("reply", NASTY)
def test_parsers_take_any_text(reply):
    assert verdicts.wilder_scores(reply) == [-1, -1]
    assert len(verdicts.in_the_wild_scores(reply)) == 2
    assert verdicts.arena_verdict(reply).judgement == "Unclear"
    assert verdicts.video_dc_score(reply) == 0
    assert verdicts.reward_choice(reply) is None
    assert verdicts.critic_verdict(reply) is None
    assert verdicts.critic_score(reply) is None


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("As a judge, I considered both. The better response: [second]", "second"),
        ("The better response: [first] ... on reflection, The better response: [2]", "second"),
        ("**The better response:** [A]", "first"),
        ("The better response: Response 1.", "first"),
        ("The better response: [Response B]", "second"),
        ("Both are equally good.", "tie"),
        ("Both are equally good at counting. The better response: [first]", "first"),
        ("The better response: A more careful answer would count.", None),
        ("The first response is incorrect", None),
    ],
)
def test_the_last_whole_verdict_counts(reply, verdict):
    assert verdicts.critic_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Score: 85", 85.0),
        ("It has 3 cups. Final Score: 78/100", 78.0),
        ("Score: 20 at first, then **Score:** 40.5", 40.5),
        ("85 out of 100, for 2 reasons", 85.0),
        ("Score: 850", None),
        ("-5", None),
        ("v2.1 is good", None),
    ],
)
def test_scores_out_of_100(reply, value):
    assert verdicts.critic_score(reply) == value


def test_rewards_are_free_of_a_favoured_place():
    advantages = [[0, 1, -1], [2, 0, 0.5], [-1, 0, 0]]
    rewards = pairwise_rewards(advantages)
    assert sum(rewards) == 0
    assert pairwise_rewards([[value + 3 for value in row] for row in advantages]) == rewards
    assert rewards == [2 - 1 - (1 - 1), 1 + 0 - (2 + 0.5), -1 + 0.5 - (-1 + 0)]
    assert best_and_worst(rewards) == (0, 1)
    assert best_and_worst([1, 3, 3, 0, 0]) == (1, 3)
    assert best_and_worst([2, 2]) is None
    assert best_and_worst([]) is None
    with pytest.raises(UserError, match="3 numbers in each of 3 rows"):
        pairwise_rewards([[0, 1], [0, 1], [0, 1]])


def test_joint_verdicts():
    assert joint_verdict(["first", "first"]) == "first"
    assert joint_verdict(["first", "second"]) == "tie"
    assert joint_verdict([None, "second"]) == "second"


class Longest(Responder):
    """A judge that runs here: it prefers the longer answer, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.seen = "longest", []

    def identity(self):
        return {"longest": 1}

    def run(self, call):
        parts = call.messages[-1]["content"]
        self.seen.append([part["type"] for part in parts])
        text = parts[-1]["text"]
        if "broken" in text:
            raise CallFailed("HTTP 500 after 3 attempts")
        if "The first response" in text:
            first, second = (text.split(f"The {name} response: [")[1].split("]\n")[0] for name in ("first", "second"))
            yield TextDelta(text=f"The better response: [{'first' if len(first) > len(second) else 'second'}]")
        else:
            answer = text.split("The LMM response: [")[1].split("]\n")[0]
            yield TextDelta(text="no idea" if answer == "?" else f"Score: {len(answer)}")


@pytest.fixture
def files(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"question_id": n, **row}) + "\n" for n, row in enumerate(rows)))
        return path

    return write


def test_a_judge_that_runs_here_scores_answers(files):
    gold = files("q.jsonl", [{"text": f"Question {n}?", "image": "a.png"} for n in range(4)])
    answers = files("p.jsonl", [{"text": "1234"}, {"text": "12"}, {"text": "?"}, {"text": "broken"}])
    judge = Judge(Longest(), cache=answers.with_suffix(".cache"))
    found = score("critic-pointwise", answers, gold, judge=judge)["metrics"]
    assert (found["score"], found["count"], found["unparsed"], found["failed_calls"]) == (3.0, 3, 1, 1)
    assert judge.responder.seen[0] == ["image", "text"]
    reviews = answers.with_suffix(".reviews.jsonl")
    assert len(reviews.read_text().splitlines()) == 3
    with pytest.raises(UserError, match=r"p.jsonl: holds answers, not reviews; name who reviews them"):
        score("critic-pointwise", answers, gold)
    again = score("critic-pointwise", reviews, files("three.jsonl", [{"text": "?", "image": "a.png"}] * 3))
    assert again["metrics"] == {"score": 3.0, "unparsed": 1, "count": 3}


def test_pairs_are_judged_in_both_orders_and_a_failed_call_voids_its_pair(files):
    gold = files("q.jsonl", [{"text": f"Question {n}?", "image": "a.png"} for n in range(10)])
    won = [{"text": "a long answer"}] * 4 + [{"text": "short"}] * 2 + [{"text": "broken"}] * 4
    answers, others = files("p.jsonl", won), files("o.jsonl", [{"text": "middling"}] * 10)
    judge = Judge(Longest(), cache=answers.with_suffix(".cache"))
    found = score("critic-pairwise", answers, gold, judge=judge, against=others)["metrics"]
    assert found["win_rate"] == pytest.approx(200 / 3)
    assert [found[name] for name in ("wins", "losses", "ties", "count", "failed", "failed_calls")] == [4, 2, 0, 6, 4, 8]
    rows = [json.loads(line) for line in answers.with_suffix(".verdicts.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["first"] * 4 + ["second"] * 2 + [None] * 4
    people = files("people.jsonl", [{"verdict": "first"}] * 5 + [{"verdict": "tie"}] * 5)
    agreement = score("verdict_agreement", answers.with_suffix(".verdicts.jsonl"), people)["metrics"]
    assert agreement["accuracy_with_ties"] == pytest.approx(100 * 4 / 6)
    assert agreement["accuracy_without_human_ties"] == 80.0
    assert (agreement["count"], agreement["failed"]) == (6, 4)


def test_a_score_that_is_no_number_is_refused(files):
    gold = files("g.jsonl", [{"score": 1, "model": "a"}, {"score": 2, "model": "b"}, {"score": 3, "model": "a"}])
    scores = files("s.jsonl", [{"score": 5}, {"score": None}, {"score": 1}])
    found = score("agreement", scores, gold)["metrics"]
    assert (found["count"], found["failed"], found["pearson"]) == (2, 1, pytest.approx(-1))
    assert found["models"] == {"a": {"score": 3.0, "gold": 2.0}}
    assert found["model_tau_a"] is None
    with pytest.raises(UserError, match=r"v.jsonl:1: verdict: must be first, second or tie, is 'A'"):
        score("verdict_agreement", files("v.jsonl", [{"verdict": "A"}]), files("w.jsonl", [{"verdict": "first"}]))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A tiny checkpoint as `lmms-lab/llava-critic-7b` is laid out: LLaVA-OneVision's fields and names, in shards."""
    base = GOLDEN.parent / "llava-onevision"
    tiny = json.loads((base / "e2e_logits" / "case.json").read_text())["config"]
    folder = tmp_path_factory.mktemp("critic")
    encoder = folder / "siglip"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model", **tiny["vision"]}))
    place = folder / "llava-critic-7b"
    place.mkdir()
    raw = {
        "_name_or_path": "lmms-lab/llava-critic-7b",
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "torch_dtype": "bfloat16",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_vision_tower_lr": 2e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    }
    raw |= tiny["model_config"] | {"mm_vision_tower": str(encoder), "eos_token_id": 266}
    (place / "config.json").write_text(json.dumps(raw))
    tensors = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in load_file(base / "e2e_logits" / "weights.safetensors").items()
    }
    names = sorted(tensors)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, place / file, metadata={"format": "pt"})
    where = {name: file for file, own in parts.items() for name in own}
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    shutil.copy(base / "preprocess" / "tokenizer.json", place)
    words = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (place / "tokenizer_config.json").write_text(json.dumps(words))
    return place, tensors


def test_the_published_layout_judges_and_goes_there_and_back(released, files, tmp_path):
    folder, tensors = released
    convert(folder, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "back", to="original")
    written = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        written |= load_file(file)
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name].to(torch.bfloat16), tensors[name]) for name in tensors)
    gold = files("q.jsonl", [{"text": "How many cups?", "image": "a.png"}])
    answers = files("p.jsonl", [{"text": "Two"}])
    judge = Judge(str(folder), cache=tmp_path / "replies.jsonl", max_tokens=8)
    found = score("critic-pointwise", answers, gold, judge=judge)["metrics"]
    assert (found["count"], found["failed_calls"]) == (1, 0)
    picture = {"type": "image", "image": str(gold.with_name("a.png"))}
    asked = judge_messages(pointwise_prompt("How many cups?", "Two"), [picture])
    chat = llavakit.load(folder)
    assert chat.processor.template == "qwen_1_5"
    said = chat.tokenizer.decode([i for i in chat.request(asked).ids() if i != chat.model.config.image_token_id])
    assert pointwise_prompt("How many cups?", "Two") in said
    assert chat.model.config.image_token_id in chat.request(asked).ids()


def test_costs_are_those_of_the_paper():
    rows = {(row.group, row.name): row.value for row in get_system("llava-critic").load("cost")().rows}
    values = list(rows.values())
    assert values[:3] == [47_000, 188_000, 564_000]
    assert values[3] == pytest.approx(5.13e12, rel=1e-3)
    assert values[7] == 8_030_345_248
    assert values[9] == pytest.approx(2.17e9, rel=1e-3)


def test_the_miniature_runs_and_is_judged_by_its_measurements():
    verdict = get_system("llava-critic").load("miniature")(seeds=(0, 1), prompts=25, steps=5)
    assert len(verdict.comparisons) == 8
    assert all(len(arm.values) == 2 for one in verdict.comparisons for arm in (one.idea, one.baseline))


def test_agreement_of_the_miniature_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    first, second = [3.0, 1.0, 2.0, 2.0, 5.0], [2.0, 1.0, 2.5, 0.0, 2.5]
    assert pearson(first, second) == pytest.approx(stats.pearsonr(first, second).statistic)
    assert tau(first, second) == pytest.approx(stats.kendalltau(first, second).statistic)
    assert pearson([1.0] * 5, second) == tau([1.0] * 5, second) == 0.0


def test_rounds_of_preferences_build_at_published_scale():
    recipe = load_recipe(get_system("llava-critic").recipe.with_name("preference.yaml"))
    assert [stage.objective.type for stage in recipe.stages] == ["dpo"] * 3
    with torch.device("meta"):
        counts = trainable_by_part(prepare(build_meta(recipe), recipe.stages[2]))
    assert sum(counts.values()) == 8_030_345_248 + 3_584  # and the newline
