"""Dialogues about operations from their annotations: exact ones, and those that a teacher writes from the same facts.

    llavakit prepare surgical_dialogues cholec80 dialogues.jsonl teacher=http://localhost:8000/v1#NAME

Exact dialogues come first and need nobody. A teacher, any model behind an OpenAI-compatible API or a model folder, gets
a clip's caption and writes paraphrases of the exact questions, three summaries, detailed questions, or a long
description. What it writes is checked against the facts: an answer with a label that the clip does not have is dropped,
a paraphrase also if it loses one. Every record says what it was made from, by whom and how. Replies are kept beside the
output, so that the same command goes on after a kill and asks again only what failed.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import UserError, quoted
from llavakit.evaluation.judges import Judge
from llavakit.generation.remote import CallFailed
from llavakit.systems.surgical_llava.annotations import read_operations
from llavakit.systems.surgical_llava.clips import Clip, Vocabulary, cut_clips, questions

Pairs = list[tuple[str, str]]
TEMPERATURES = (0.2, 0.7, 1.0)  # of the attempts at a reply that can be read
VERSION = 1  # of the instructions below; part of a record's provenance

ROLE = (
    "You write training dialogues about video clips of operations. You have not seen the clip, but you know what "
    "experts annotated in it, and you write as if you had watched it. Say nothing that the annotation does not say: no "
    "other instrument, action, tissue or phase, no outcome, no advice, no identity of a person."
)
FORM = (
    "Reply with nothing but a Python list of dictionaries, each with the keys 'Q' and 'A', for example "
    "[{'Q': 'a question', 'A': 'its answer'}]."
)
TASKS = {
    "paraphrase": (
        "Rephrase each of the following questions and answers, in their order, as a surgeon in training might ask and "
        "an expert would answer. Keep every instrument, action, tissue and phase that is named."
    ),
    "summary": (
        "Write three different questions that ask for a summary of the clip, each with an answer of a few sentences."
    ),
    "detail": (
        "Write five questions about details of the clip (which instrument, what it does, to what, when, in which "
        "phase), each answered by the annotation directly."
    ),
    "description": (
        "Write one question that asks for a thorough description of the clip, and one answer of 150 to 300 words that "
        "tells in order of time what the annotation says."
    ),
}
KINDS = ("template", *TASKS)
COUNTS = {"summary": 3, "detail": None, "description": 1}


@dataclass(frozen=True)
class Job:
    """One dialogue that a teacher is to write."""

    clip: Clip
    kind: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the teacher is asked."""
        text = f"{TASKS[self.kind]}\n\nAnnotation of the clip:\n{self.clip.caption}"
        if self.kind == "paraphrase":
            pairs = [{"Q": question, "A": answer} for question, answer in questions(self.clip)]
            text += f"\n\nQuestions and answers:\n{pairs}"
        return [{"role": "system", "content": ROLE}, {"role": "user", "content": f"{text}\n\n{FORM}"}]


def parse_pairs(reply: str, count: int | None = None) -> Pairs | None:
    """The list of questions and answers in a reply, as a Python literal or JSON; None if there is none.

    Args:
        count: How many there must be.
    """
    found = re.search(r"\[.*\]", reply, re.DOTALL)
    if found is None:
        return None
    readers: tuple[Callable[[str], Any], ...] = (ast.literal_eval, parse_json)
    value = None
    for read in readers:
        try:
            value = read(found.group())
            break
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, JsonError):
            continue
    if not isinstance(value, list) or not value or count not in (None, len(value)):
        return None
    pairs = []
    for entry in value:
        both = [entry.get(key) for key in ("Q", "A")] if isinstance(entry, Mapping) else [None]
        if not all(isinstance(text, str) and text.strip() for text in both):
            return None
        pairs.append((both[0].strip(), both[1].strip()))
    return pairs


def checked(job: Job, pairs: Pairs, vocabulary: Vocabulary) -> Pairs:
    """The pairs that say nothing but the facts; of paraphrases those that also say as much as the exact ones."""
    allowed = vocabulary(" . ".join(_labels(job.clip)))
    exact = questions(job.clip) if job.kind == "paraphrase" else [None] * len(pairs)
    kept = []
    for pair, original in zip(pairs, exact, strict=True):
        said = [vocabulary(text) for text in pair]
        if not said[0] | said[1] <= allowed:
            continue
        if original is not None and not vocabulary(original[1]) <= said[1]:
            continue
        kept.append(pair)
    return kept


def _labels(clip: Clip) -> list[str]:
    facts = clip.facts
    words = [facts.get(name, "") for name in ("phase", "before", "after")]
    return [*words, *clip.tools, *(word for triplet in clip.triplets for word in triplet)]


def record_of(clip: Clip, kind: str, pairs: Pairs, suffix: str, **provenance: Any) -> dict[str, Any]:
    """A training record: the stretch of the video, a dialogue, the facts, and where all of it comes from."""
    video = clip.operation.video or f"{clip.operation.name}{suffix}"
    messages: list[dict[str, Any]] = []
    for question, answer in pairs:
        content: Any = question
        if not messages:
            part = {"type": "video", "video": video, "start": clip.start, "end": clip.end}
            content = [part, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    origin = {"kind": kind, "annotations": [Path(file).name for file in clip.operation.source], "caption": clip.caption}
    return {
        "id": clip.id if kind == "template" else f"{clip.id}_{kind}",
        "messages": messages,
        "facts": clip.facts,
        "provenance": origin | provenance,
    }


def surgical_dialogues(
    source: Path,
    output: Path,
    bad: Left,
    *,
    kinds: str | None = None,
    clip: float = 40.0,
    shortest: float = 1.0,
    suffix: str = ".mp4",
    teacher: str | None = None,
    base_url: str | None = None,
    api_key_env: str | None = None,
    concurrency: int | None = None,
    attempts: int = 3,
    price_in: float | None = None,
    price_out: float | None = None,
    max_cost: float | None = None,
) -> dict[str, Any]:
    """Preparation of dialogues from annotations; see `read_operations` for what is read.

    Args:
        kinds: Comma-separated choice of "template" (exact), "paraphrase", "summary", "detail", "description"; default:
            "template", with a teacher all but "paraphrase".
        clip: Longest clip in seconds. No clip crosses a border of phases.
        shortest: Shorter phases are left out.
        suffix: What names of videos end with, where annotations do not name them.
        teacher: Address (`http://host:8000/v1#NAME`), model folder, or name of a model at `base_url`; the further
            options are those of `llavakit.generation.remote.APIClient`.
        attempts: How often (1 to 3) a teacher is asked whose reply cannot be read.

    Raises:
        UserError: If an option does not fit, or no operation can be read.
    """
    wanted = _kinds(kinds, teacher)
    if not clip > 0 or shortest < 0:
        raise UserError(f"clip and shortest must be positive seconds, not {clip:g} and {shortest:g}")
    operations = list(read_operations(source, bad))
    if not operations:
        why = next((f": {error}" for error in bad.bad.errors()), "")
        raise UserError(f"{source}: no operation could be read{why}")
    clips = [own for operation in operations for own in cut_clips(operation, clip, shortest)]
    clips = [own for own in clips if questions(own)]
    records = [record_of(own, "template", questions(own), suffix) for own in clips if "template" in wanted]
    counts: Counter[str] = Counter()
    if wanted != ["template"]:
        api = {"api_key_env": api_key_env, "price_in": price_in, "price_out": price_out, "max_cost": max_cost}
        given = {name: value for name, value in api.items() if value is not None}
        cache = output.with_suffix(".teacher.jsonl")
        with Judge(str(teacher), base_url, concurrency=concurrency, cache=cache, **given) as asker:
            jobs = [Job(own, kind) for own in clips for kind in wanted if kind != "template"]
            made, counts = taught(asker, jobs, suffix, attempts)
            records += made
    order = {own.id: number for number, own in enumerate(clips)}
    records.sort(key=lambda record: (order[_clip_id(record)], KINDS.index(record["provenance"]["kind"])))
    written = write_records(output, records)
    return {"operations": len(operations), "clips": len(clips), "records": written, **counts}


def _clip_id(record: Mapping[str, Any]) -> str:
    kind = record["provenance"]["kind"]
    return record["id"] if kind == "template" else record["id"].removesuffix(f"_{kind}")


def _kinds(kinds: str | None, teacher: str | None) -> list[str]:
    if kinds is None:
        return ["template"] if teacher is None else ["template", "summary", "detail", "description"]
    names = [name.strip() for name in kinds.split(",")]
    for name in names:
        if name not in KINDS:
            raise UserError(f"kinds: {quoted(name)} is unknown; known: {', '.join(KINDS)}")
    if teacher is None and names != ["template"]:
        need = ", ".join(name for name in names if name != "template")
        raise UserError(f"kinds: {need}: only a teacher writes these (teacher=URL)")
    return names


def taught(
    asker: Judge, jobs: Sequence[Job], suffix: str, attempts: int = 3
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The records of what a teacher writes, and counts: `dropped` pairs, `unreadable` replies, `failed_calls`.

    Raises:
        APIRefused: If no call can be answered; what was answered is kept.
    """
    labels: Iterable[str] = dict.fromkeys(label for job in jobs for label in _labels(job.clip) if label)
    vocabulary = Vocabulary(labels)

    def write(job: Job) -> Pairs:
        count = len(questions(job.clip)) if job.kind == "paraphrase" else COUNTS[job.kind]
        return asker.ask_parsed(job.messages, lambda reply: parse_pairs(reply, count), TEMPERATURES[:attempts]) or []

    records, counts = [], Counter({"dropped": 0, "unreadable": 0, "failed_calls": 0})
    for job, pairs in zip(jobs, asker.map(write, jobs), strict=True):
        if isinstance(pairs, CallFailed):
            counts["failed_calls"] += 1
            continue
        kept = checked(job, pairs, vocabulary) if pairs else []
        counts["unreadable"] += not pairs
        counts["dropped"] += len(pairs) - len(kept)
        if kept:
            by = {"teacher": asker.responder.name, "instructions": VERSION}
            records.append(record_of(job.clip, job.kind, kept, suffix, **by))
    return records, counts
