"""LLaVA-Med's golden components of data and scores: self-instruct generation, medical VQA, the judged chat."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation import processors
from llavakit.evaluation.score import score
from llavakit.proof.golden import Case, Example, component, examples, take
from llavakit.systems.llava_med import chat_eval, instruct, vqa
from llavakit.systems.llava_med.vqa_files import read_questions

SEEDS = (0, 1, 2)
TABLES = {
    "contractions": processors.contractions(),
    "number_map": processors.NUMBER_WORDS,
    "articles": processors.ARTICLES,
    "punctuation": list(processors.PUNCTUATION),
}
SCRIPT_NAMES = {
    "exact match score": "open_exact_match",
    "f1 score": "open_f1",
    "precision": "open_precision",
    "recall": "open_recall",
    **{f"bleu_score{order}": f"open_bleu{order}" for order in ("", "_1", "_2", "_3")},
    "open accuracy": "open_accuracy",
    "yes/no accuracy": "closed",
    "recall_closed": "closed_recall",
}
JUDGE_NAMES = {
    "gpt4_score": "reference",
    "pred_score": "candidate",
    "pred_relative_score": "relative_score",
    "data_size": "count",
}


def generation(case: Case) -> Iterator[Example]:
    """Contexts of figures, and the messages that ask for a conversation about the first."""
    case.informational("config.few_shot", "config.temperature")
    shots, samples = take(case.inputs["few_shot"]), take(case.inputs["samples"])
    for name, mentions in (("with", True), ("without", False)):
        yield from examples(partial(instruct.context_of, mentions=mentions), samples, f"context_{name}")
    for name, mentions in (("messages", True), ("messages_without", False)):
        compute = partial(instruct.request, samples[0], shots, mentions=mentions, system="SYSTEM TEXT")
        yield Example(name, compute, name)


@component(ordered=True)  # one random bit after the other says where pictures stand
def cleaning(case: Case) -> Iterator[Example]:
    """Completions as records, and what cleaning leaves of them."""
    case.informational("config.random")
    completions = take(case.inputs["results"])

    def run(seed: int) -> dict[str, Any]:
        random.seed(seed)
        results = []
        for number, reply in enumerate(completions):
            figure = {"pair_id": f"p{number}", "domain": {"mri": True}}
            made = instruct.formatted(figure, reply, image_behind=bool(random.getrandbits(1)))
            kept = None if made is None else instruct.cleaned(made)
            results.append({"formatted": made, "cleaned": [] if kept is None else [kept]})
        return {"seed": seed, "results": results}

    for number, seed in enumerate(SEEDS):
        yield Example(f"seed {seed}", partial(run, seed), f"runs.{number}")


def medical_vqa(case: Case) -> Iterator[Example]:
    """Normalised texts, word overlap, and both scripts' tables."""
    case.informational("config.paper_*")
    check_tables(take({name: case.config[name] for name in TABLES}))
    gold, candidates = take(case.inputs["gt"]), take(case.inputs["candidate"])
    predictions = take(case.inputs["pred"])

    def scores(pair: list[str]) -> dict[str, Any]:
        found = vqa.overlap(*pair) | {"exact": vqa.exact_match(*pair)}
        return found | {"appearance": float(vqa.nearest_is(*pair, list(map(str, candidates["0"]))))}

    def items() -> list[dict[str, Any]]:
        with files_of(gold=gold) as place:
            questions = read_questions(place["gold"])
        found = []
        for question, prediction in zip(questions, predictions, strict=True):
            text, data = prediction["text"], question.data
            found.append(
                {
                    "id": prediction["question_id"],  # ids that repeat are numbered in `questions`
                    "type": data["answer_type"],
                    "gt_normalised": vqa.normalised(data["answer"]),
                    "pred_normalised": vqa.normalised(text),
                    "recall": vqa.overlap(text, data["answer"])["recall"],
                    "substring_hit": int(vqa.says(text, data["answer"])),
                    "yes_or_no_in_pred": vqa.names_yes_or_no(text),
                }
            )
        return found

    def script(protocol: str) -> dict[str, float]:
        with files_of(gold=gold, predictions=predictions, candidates=candidates) as place:
            options = {"protocol": protocol, "candidates": str(place["candidates"])}
            found = score("vqa_rad", place["predictions"], place["gold"], **options)["metrics"]
        names = SCRIPT_NAMES if protocol == "batch" else {k: v for k, v in SCRIPT_NAMES.items() if k != "recall_closed"}
        return {name: found[own] or 0.0 for name, own in names.items()}  # 0 where there is no question of the kind

    yield from examples(vqa.normalised, case.inputs["strings"], "normalize_word")
    yield from examples(scores, take(case.inputs["pairs"]), "pairs")
    yield Example("items", items, "items")
    yield Example("run_eval", partial(script, "single"), "run_eval")
    yield Example("run_eval_batch", partial(script, "batch"), "run_eval_batch")


def check_tables(tables: Mapping[str, Any]) -> None:
    """Refuse a case with other tables of words than the metric's own.

    Raises:
        UserError: It names the table.
    """
    for name, own in TABLES.items():
        if (set(own) if name == "articles" else own) != (set(tables[name]) if name == "articles" else tables[name]):
            raise UserError(f"config.{name}: is not the table of this metric")


@contextmanager
def files_of(**contents: Any) -> Iterator[dict[str, Path]]:
    """JSON files in a folder, by name."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.json" for name in contents}
        for name, content in contents.items():
            paths[name].write_text(json.dumps(content), encoding="utf-8")
        yield paths


def gpt_judge(case: Case) -> Iterator[Example]:
    """Relative scores by group, a judge's messages, and groups of requests."""
    case.informational("config.judge", "config.order")
    rows, shown = take(case.inputs["rows"]), take(case.inputs["message_example"])

    def result() -> dict[str, dict[str, float]]:
        with files_of(reviews=rows) as place:
            found = score("llava_med_chat", place["reviews"])["metrics"]
        groups = {**found["by_group"], "overall": found}
        return {name: {ours: own[theirs] for ours, theirs in JUDGE_NAMES.items()} for name, own in groups.items()}

    yield Example("result", result, "result")
    messages = partial(chat_eval.review_messages, shown, instruction="INSTRUCTION TEXT", system="SYSTEM TEXT")
    yield Example("messages", messages, "messages")
    for name, lengths in case.wanted.json.items():
        if name.startswith("chunks_of_"):
            size = int(name.removeprefix("chunks_of_"))
            for length in lengths:
                yield Example(f"{name}.{length}", partial(chat_eval.chunks, int(length), size), f"{name}.{length}")


ADAPTERS = {
    "metric_vqa_rad_slake_pathvqa": medical_vqa,
    "metric_gpt_4_judge": gpt_judge,
    "self_instruct_generation": generation,
    "self_instruct_cleaning": cleaning,
}
