"""LLaVA-Critic's golden components: judge prompts, parsers, agreement, rewards; preference training in its own file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.evaluation.benchmarks.mmvet import grade_prompt
from llavakit.evaluation.rewards import best_and_worst, ordered_pairs, pairwise_rewards
from llavakit.evaluation.score import score
from llavakit.proof.entries import or_nan, prompt_ids, prompt_text, text_processor, with_blank_media
from llavakit.proof.golden import Case, Example, Result, examples, take
from llavakit.systems.llava_critic import parity_dpo, prompts, verdicts
from llavakit.systems.llava_critic.benchmarks import reward_summary

TEMPLATE = "qwen_1_5"
ARENA_REPLIES = {"model_a": "[[A>B]]", "model_b": "[[B>A]]", "tie": "[[A=B]]"}


# Prompts and replies


def critic_prompts(case: Case) -> list[Example]:
    """The released prompts in the template, and their ids."""
    processor = text_processor(parity_dpo.load_tokenizer(case), TEMPLATE)

    def written(query: Mapping[str, Any]) -> dict[str, Any]:
        write = prompts.pairwise_prompt if len(query["responses"]) == 2 else prompts.pointwise_prompt
        asked = write(query["question"], *query["responses"])
        messages = with_blank_media(prompts.judge_messages(asked, [{"type": "image", "image": None}]))
        ids = prompt_ids(processor, messages, add_generation_prompt=True)
        return {
            "prompt": prompt_text(TEMPLATE, messages, add_generation_prompt=True),
            "num_ids": len(ids),
            "image_position": ids.index(IMAGE_PLACEHOLDER),
            "first_ids": ids[:45],
            "last_ids": ids[-30:],
        }

    return examples(written, case.inputs["queries"], "prompts")


def pairwise_arena_parse(case: Case) -> Iterator[Example | Result]:
    """WildVision's verdicts."""

    def read(reply: str) -> dict[str, Any]:
        found = verdicts.arena_verdict(reply)
        fields = {name: getattr(found, name) for name in ("raw", "winner", "judgement")}
        return fields | {"score_field": [found.label, found.unlabelled]}

    yield from examples(read, case.inputs["responses"], "parsed")
    fixed = prompts.arena_prompt("Q?", "one", "two")
    yield Result(json={"baseline": prompts.ARENA_BASELINE, "prompt": fixed})


def pairwise_arena_aggregate(case: Case) -> list[Example]:
    """Win rates, of reviews that say who won."""

    def summed(winners: list[str]) -> dict[str, Any]:
        replies = [{"review": ARENA_REPLIES[winner]} for winner in winners]
        found = _scored("wildvision", replies)
        return {name: found[name] for name in ("elo_win_rate", "win_rate", "mean_raw")}

    return examples(summed, case.inputs)


def relative_score_parse(case: Case) -> Iterator[Example | Result]:
    """Both readings of two scores, and the relative score."""
    yield from examples(verdicts.wilder_scores, case.inputs["reviews"], "wilder")
    yield from examples(verdicts.in_the_wild_scores, case.inputs["reviews"], "in_the_wild")
    yield from examples(verdicts.relative_score, case.inputs["aggregate"], "aggregate")
    doc = case.inputs["doc"]
    prompt = prompts.wilder_prompt(doc["Question"], doc["Answer"], doc["prediction"])
    yield Result(json={"wilder_prompt": prompt})


def mmvet_judge(case: Case) -> Iterator[Example]:
    """MM-Vet's grades by a judge that gives the case's replies, one per call."""

    def graded(question: Mapping[str, Any]) -> dict[str, Any]:
        replies, temperatures = iter(take(question["replies"])), []

        def ask(temperature: float) -> str:
            temperatures.append(temperature)
            return next(replies, "")

        grade = verdicts.mmvet_grade(ask)
        prompt = grade_prompt(question["question"], question["answer"], question["prediction"], rule="")
        return {"score": grade, "temperatures": temperatures, "prompt_tail": prompt}

    yield from examples(graded, case.inputs["cases"], "cases")

    def overall() -> float:
        grades = take(case.inputs["scores"])
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder) / "graded.jsonl", Path(folder) / "mm-vet.json"
            rows = [json.dumps({"question_id": f"v1_{n}", "score": grade}) for n, grade in enumerate(grades)]
            files[0].write_text("\n".join(rows), encoding="utf-8")
            files[1].write_text(json.dumps({f"v1_{n}": {} for n in range(len(grades))}), encoding="utf-8")
            return score("mmvet", *files)["metrics"]["score"]

    yield Example("overall", overall, "overall")


def vl_rewardbench(case: Case) -> Iterator[Example]:
    """VL-RewardBench's prompts, choices and means."""

    def judged(doc: Mapping[str, Any]) -> dict[str, Any]:
        doc = take(doc)
        judgement = doc.pop("judgement")
        choice = verdicts.reward_choice(judgement)
        found: dict[str, Any] = {"prompt": prompts.reward_prompt(doc["query"], doc["response"]), "parsed": choice}
        result = None
        if choice is not None:
            accuracy = _scored("vl-rewardbench", [{"question_id": doc["id"], "text": judgement}], [doc])["accuracy"]
            group = verdicts.reward_group(doc["id"])
            result = {"question_id": doc["id"], "category": group, "score": accuracy / 100}
        return found | {"result": result}

    yield from examples(judged, case.inputs["docs"], "docs")

    def macro() -> float:
        rows = [(row["category"], row["score"]) for row in case.inputs["aggregate"]]
        return reward_summary(rows)["macro_accuracy"] / 100

    yield Example("aggregate", macro, "aggregate")


def video_dc_parse(case: Case) -> list[Example]:
    """Scores of literal dictionaries."""
    return examples(verdicts.video_dc_score, case.inputs["reviews"], "scores")


# Agreement and rewards


def judge_pointwise_agreement(case: Case) -> list[Example]:
    """Two files of scores."""

    def agreement(run: Mapping[str, Any]) -> dict[str, Any]:
        run = take(run)
        rows: dict[str, list[dict[str, Any]]] = {}
        for name in ("judge", "reference"):
            cells = [(model, value) for instance in run[name] for model, value in enumerate(instance)]
            rows[name] = [{"model": str(model), "score": value} for model, value in cells]
        found = _scored("agreement", rows["judge"], rows["reference"])
        models = [found["models"][str(number)] for number in range(len(run["judge"][0]))]
        return {
            "pearson_instances": or_nan(found["pearson"]),
            "model_means_judge": [own["score"] for own in models],
            "model_means_reference": [own["gold"] for own in models],
            "kendall_model_ranking": {name: or_nan(found[f"model_{name}"]) for name in ("tau_a", "tau_b")},
        }

    return examples(agreement, case.inputs)


def judge_pairwise_agreement(case: Case) -> list[Example]:
    """Two files of verdicts."""
    names = {
        "accuracy_with_tie": "accuracy_with_ties",
        "accuracy_without_human_ties": "accuracy_without_human_ties",
        "accuracy_neither_side_tie": "accuracy_without_any_ties",
    }

    def agreement(run: Mapping[str, Any]) -> dict[str, Any]:
        rows = [[{"verdict": verdict} for verdict in run[name]] for name in ("judge", "human")]
        found = _scored("verdict_agreement", *rows)
        return {name: None if found[own] is None else found[own] / 100 for name, own in names.items()}

    return examples(agreement, case.inputs)


def reward_aggregation(case: Case) -> list[Example]:
    """Rewards and the pair that is trained on."""

    def aggregated(run: Mapping[str, Any]) -> dict[str, Any]:
        rewards = pairwise_rewards(take(run["a"]))
        chosen, rejected = best_and_worst(rewards) or (0, 0)
        return {
            "reward": rewards,
            "chosen": chosen,
            "rejected": rejected,
            "judge_calls": len(ordered_pairs(len(rewards))),
        }

    return examples(aggregated, case.inputs)


def _scored(task: str, rows: list[dict[str, Any]], gold: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The metrics of a benchmark from files of these rows."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "predictions.jsonl", Path(folder) / "gold.jsonl"
        for file, own in zip(files, (rows, gold or [{} for _ in rows]), strict=True):
            lines = [json.dumps({"question_id": number, **row}) for number, row in enumerate(own)]
            file.write_text("\n".join(lines), encoding="utf-8")
        return score(task, *files)["metrics"]


ADAPTERS = {
    "critic_prompts": critic_prompts,
    "pairwise_arena_parse": pairwise_arena_parse,
    "pairwise_arena_aggregate": pairwise_arena_aggregate,
    "relative_score_parse": relative_score_parse,
    "mmvet_judge": mmvet_judge,
    "vl_rewardbench": vl_rewardbench,
    "video_dc_parse": video_dc_parse,
    "judge_pointwise_agreement": judge_pointwise_agreement,
    "judge_pairwise_agreement": judge_pairwise_agreement,
    "reward_aggregation": reward_aggregation,
    **parity_dpo.ADAPTERS,
}
