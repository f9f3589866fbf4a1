"""LLaVA-o1's golden components: stages, judge, searches, questions, labels, data made with a teacher."""

from __future__ import annotations

import base64
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.conversation.messages import normalise
from llavakit.data.preparation import prepare
from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks.base import write_lines
from llavakit.evaluation.records import read_records
from llavakit.generation.request import Request, SamplingParams
from llavakit.generation.search import Branch
from llavakit.proof.entries import text_processor, training_sample
from llavakit.proof.golden import Case, Example, declined, examples, take
from llavakit.proof.id_tokenizer import IdTokenizer
from llavakit.splice.scatter import IGNORE
from llavakit.systems.llava_o1 import teaching
from llavakit.systems.llava_o1.judging import ALL, SENTENCE, Judge
from llavakit.systems.llava_o1.searching import PUBLISHED_CANDIDATES, SAMPLING, SEARCHES, Retracing, swires
from llavakit.systems.llava_o1.stages import NAMES, end_of, sections

INDENTS = {"simple_inference": 8, "vlmevalkit": 12}
NO_IMAGE_CALL = "correct", "The process is incorrect."


# Stages and judge


def stage_parse(case: Case) -> list[Example]:
    """Contents of stages."""

    def read(text: str) -> dict[str, str | None]:
        return {name.lower(): content for name, content in sections(text).items()}

    return examples(read, case.inputs["texts"], "stages")


def checked(text: str, wrong_words: Sequence[str]) -> str:
    """The scripted judge's verdict on one reasoning."""
    reasoning = text.split("Reasoning Process: ", 1)[1]
    return NO_IMAGE_CALL[any(word in reasoning for word in wrong_words)]


def judge_prompts(case: Case) -> list[Example]:
    """Every text that the judge receives, and who wins."""
    indent = INDENTS[case.config["implementation"]]
    kinds = {"all": ALL, "sentence": SENTENCE}

    def judged(item: Mapping[str, Any]) -> dict[str, Any]:
        item, calls = take(item), []

        def ask(text: str, image: bool) -> str:
            if image:
                reply = "Since [r], I choose response 1." if item.get("reply") is None else item["reply"]
            else:
                reply = checked(text, item.get("wrong_words") or ())
            kind = "judge" if image else "verify"
            calls.append({"kind": kind, "text": text, "image_attached": image, "reply": reply})
            return reply

        kind = kinds.get(item["type"], item["type"].upper())
        winner = Judge(ask, item["prompt"], indent)(kind, *item["outputs"])
        return {"winner_index": winner, "calls": calls}

    return examples(judged, case.inputs["items"], "items")


# Searches


class Script:
    """A model and a judge that say what a case scripts, and note every call.

    Args:
        item: The case's item.
        by_prefix: Whether texts are counted per prefix, or per stage.
    """

    def __init__(self, item: Mapping[str, Any], by_prefix: bool) -> None:
        self.item, self.script, self.by_prefix = item, item["script"], by_prefix
        self.trace: list[dict[str, Any]] = []
        self.draws: list[list[int]] = []
        self.nth: Counter[Any] = Counter()
        self.settings: list[SamplingParams] = []
        self.random = np.random.RandomState(item.get("seed", 0))

    @property
    def sentences(self) -> bool:
        """Whether the script goes by sentences."""
        return self.script.get("by") == "sentence"

    def stage(self, prefix: str) -> str:
        """The stage that is asked for."""
        return next((name for name in NAMES if end_of(name) not in prefix), NAMES[-1])

    def continued(self, prefix: str, stop: Sequence[str]) -> str:
        """The next scripted text, cut at the stop rule."""
        stage = self.stage(prefix)
        key = f"sent{prefix.count('.')}" if self.sentences else stage
        place = (key, prefix) if self.by_prefix else key
        nth = self.nth[place]
        self.nth[place] += 1
        self.note(key, nth, prefix)
        known = self.script["continuations"]
        texts = known.get(key, known.get("*"))
        text = texts[nth % len(texts)]
        marks = [end for end in stop if end.startswith("</")] + (["."] if self.item.get("type") == "sentence" else [])
        ends = [text.find(mark) + len(mark) for mark in marks if mark in text]
        return text[: min(ends)] if ends else text

    def note(self, key: str, nth: int, prefix: str) -> None:
        """Note a call of the model."""
        self.trace.append({"call": "generate", "at": key, "nth": nth, "prefix_len": len(prefix)})

    def expand(self, branches: Sequence[Branch], sampling: SamplingParams) -> list[list[Branch]]:
        """What `Chat.expand` does."""
        self.settings.append(sampling)
        (branch,) = branches
        grown = (branch.text + self.continued(branch.text, sampling.stop) for _ in range(sampling.n))
        return [[Branch(branch.request, text=text) for text in grown]]

    def ask(self, text: str, image: bool) -> str:
        """The judge's reply."""
        if not image:
            reply = checked(text, self.script.get("wrong_words") or ())
            tail = (text + "<|assistant|>")[-160:]
            self.trace.append({"call": "verify", "reply": reply, "prompt_tail": tail, "responses": None})
            return reply
        shown = re.findall(r"\nRepsonse \d: (.*)", text)
        points = [max([p for word, p in self.script["score"].items() if word in one], default=0) for one in shown]
        reply = self.script.get("judge_reply")
        if reply is None:
            reply = f"Since [x], I choose response {1 + (points[1] > points[0])}."
        self.trace.append({"call": "judge", "reply": reply, "prompt_tail": None, "responses": shown})
        return reply

    def draw(self, count: int) -> int:
        """A number below `count`."""
        found = int(self.random.randint(count))
        self.draws.append([count, found])
        return found


def searched(implementation: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """One search on a scripted model."""
    item = take(item)
    name, script = item["type"].lower(), Script(item, by_prefix=True)
    candidates = item.get("beam_size", 2) if implementation == "simple_inference" else PUBLISHED_CANDIDATES[name]
    sampling = SamplingParams(**{**vars_of(SAMPLING), "n": candidates})
    judge = Judge(script.ask, item["prompt"], INDENTS[implementation])
    *_, reply = SEARCHES[name](script.expand, Branch(Request(input_ids=[0])), sampling, judge, script.draw)
    counts = Counter(call["call"] for call in script.trace)
    used = {(own.temperature, own.top_p, own.max_new_tokens) for own in script.settings}
    return {
        "answer": reply.text,
        "counts": {name: counts[name] for name in ("generate", "verify", "judge")},
        "total_calls": len(script.trace),
        "random_draws": script.draws,
        "trace": script.trace,
        "sampling": [
            {"do_sample": temperature > 0, "max_new_tokens": length, "temperature": temperature, "top_p": top_p}
            for temperature, top_p, length in sorted(used)
        ],
    }


def vars_of(sampling: SamplingParams) -> dict[str, Any]:
    """The fields that a case says something of."""
    return {name: getattr(sampling, name) for name in ("temperature", "top_p", "max_new_tokens")}


def search(case: Case) -> list[Example]:
    """Searches with the model as its own judge."""
    case.informational("inputs.items.*.image", "inputs.items.*.beam_size")
    return examples(partial(searched, case.config["implementation"]), case.inputs["items"], "items")


class RewardScript(Script):
    """The same for a search with rewards."""

    def note(self, key: str, nth: int, prefix: str) -> None:
        self.trace.append({"call": "generate", "stage": key, "nth": nth, "prefix": prefix})

    def reward(self, prompt: str, texts: Sequence[str]) -> list[float]:
        """The table's figure of the first word that a text holds."""
        scores = [next((score for word, score in self.item["rewards"] if word in text), -9) for text in texts]
        self.trace.append(
            {"call": "reward", "n": len(texts), "user_prompt": prompt, "texts": list(texts), "scores": scores}
        )
        return scores


def retracing(case: Case) -> list[Example]:
    """SWIRES on a scripted model and a table of rewards."""
    case.informational("inputs.items.*.image")
    config = case.config
    names = {"captions": "M", "kept": "N", "rounds": "max_rounds", "cutoff": "cutoff"}
    settings = Retracing(**{own: config[name] for own, name in names.items() if name in config})

    def searched_with_rewards(item: Mapping[str, Any]) -> dict[str, Any]:
        item = take(item)
        script = RewardScript(item, by_prefix=False)
        root = Branch(Request(input_ids=[0]))
        *_, reply = swires(script.expand, root, SAMPLING, script.reward, item["prompt"], settings)
        rewards = [call for call in script.trace if call["call"] == "reward"]
        return {
            "answer": reply.text,
            "lm_calls": len(script.trace) - len(rewards),
            "reward_calls": len(rewards),
            "reward_texts": sum(call["n"] for call in rewards),
            "trace": script.trace,
        }

    return examples(searched_with_rewards, case.inputs["items"], "items")


# Questions, labels, data


def eval_prompts(case: Case) -> list[Example]:
    """Questions of the benchmarks."""

    def asked(item: Mapping[str, Any]) -> dict[str, Any]:
        item = take(item)
        given = {name: cell for name, cell in item["line"].items() if cell == cell}  # without NaN
        with tempfile.TemporaryDirectory() as place:
            source, output = Path(place) / "source.jsonl", Path(place) / "questions.jsonl"
            write_lines(source, [given | {"image": item["images"]}])
            try:
                options = {"dataset": item["dataset"] or "", "model": item["model_name"]}
                counts = prepare("staged_questions", source, output, **options)
            except RecordError:
                raise
            except UserError:  # asked as it is
                return {"custom": False}
            (question,) = (record.data for record in read_records(output))
        limit = counts["max_new_tokens"]
        return {"custom": True, "text": question["text"], "n_images": len(question["image"]), "max_new_tokens": limit}

    return examples(asked, case.inputs["items"], "items")


def labels(case: Case) -> list[Example]:
    """Labels of conversations in Llama-3's format."""
    start, head, shut, end, image = (
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        128256,
    )
    named = {start: 128000, head: 128006, shut: 128007, end: 128009, "\n\n": 271}
    named |= {"system": 9125, "user": 882, "assistant": 78191}
    rows, pad = take(case.inputs["input_ids"]), case.config["pad_token_id"]
    known = IdTokenizer(named, rows, start, end)
    processor = text_processor(known.tokenizer, "llava_o1")

    def labelled(row: Sequence[int]) -> list[int]:
        first, last = 0, len(row)
        while first < last and row[first] == pad:
            first += 1
        while last > first and row[last - 1] == pad:
            last -= 1
        ids = row[first:last]
        begun = next((n for n, number in enumerate(ids) if number == named[head]), len(ids))  # begin tokens may be two
        messages = []
        for turn in known.text(ids[begun:]).split(head)[1:]:
            role, _, content = turn.partition(shut)
            messages.append({"role": role, "content": content.removeprefix("\n\n").removesuffix(end)})
        if not messages:
            return [IGNORE] * len(row)
        length = len(ids) - begun + 1  # the template writes one begin token
        sample = training_sample(processor, normalise(messages), labels="header_break", max_length=length)
        found = [int(label) for label in sample["labels"]][1:]
        own = [label if label == IGNORE else known.original[label] for label in found]
        own = [IGNORE] * (first + begun) + own + [IGNORE] * (len(row) - last)
        return [IGNORE if label in (image, pad) else label for label in own]

    return examples(labelled, rows, "labels")


def datagen(case: Case) -> dict[str, Any]:
    """Requests to teacher and verifier, and what is written."""
    case.informational("config.threads")
    inputs = take(case.inputs)
    calls: list[dict[str, Any]] = []

    def scripted(kind: str, length: int | None) -> Callable[[str | None, Sequence[str]], str]:
        replies = iter(inputs[kind])

        def ask(image: str | None, texts: Sequence[str]) -> str:
            parts = [{"type": "text", "value": text} for text in texts]
            if image is not None:
                data = base64.b64encode(b"abc").decode()  # what the case's files hold
                parts.insert(0, {"type": "image_url", "value": f"data:image/jpeg;base64,{data}"})
            calls.append({"kind": kind, "model": "gpt-4o", "max_tokens": length, "parts": parts})
            return next(replies)

        return ask

    def made() -> dict[str, Any]:
        output, refused = teaching.staged_records(
            inputs["records"],
            scripted("teacher", None),
            scripted("judge", teaching.VERDICT_TOKENS),
            has_image=set(inputs["image_files"]).__contains__,
            done=inputs.get("already_done") or (),
            refused=inputs.get("refused") or (),
        )
        return {"exception": None, "output": output, "refusal": list(map(str, refused)), "calls": calls}

    return made()


ADAPTERS = {
    "stage_parse": stage_parse,
    "stopping": declined(
        "the original looks for stop strings in the prompt too, so a question that mentions a tag ends its stage at "
        "the "
        "first token; llavakit's engine looks at new text alone"
    ),
    "judge_prompts": judge_prompts,
    "search": search,
    "swires": retracing,
    "eval_prompts": eval_prompts,
    "labels": labels,
    "datagen": datagen,
    "collate": declined(
        "the original pairs turns as they come and trains on <image> as literal text; llavakit's reader puts the image "
        "where the mark stands and refuses turns that do not alternate"
    ),
}
