"""Dialogues about figures, written by a teacher from captions: the self-instruct data of the second stage.

    llavakit prepare figure_dialogues figures.jsonl dialogues.json teacher=http://localhost:8000/v1#NAME

A figure has `pair_id`, `fig_label`, `fig_caption`, `in_text_mention` and `domain`; with `most` the five domains take
turns until there are so many. What fails, or cannot be read, is asked again in up to four rounds. Replies are kept
beside the output, so that the same command goes on after a kill and asks only what has no reply yet. Every record says
who wrote it, from what, and how many of its answers were dropped. What a request says and what is kept of a reply is in
`instruct`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.data.readers import open_source
from llavakit.errors import FieldError, RecordError, UserError, quoted
from llavakit.evaluation.judges import Judge
from llavakit.generation.remote import CallFailed
from llavakit.systems.llava_med.instruct import by_domain, cleaned, formatted, request, with_image

ROUNDS = 4
VERSION = 1  # of the rules to the teacher; part of a record's provenance
Figure = Mapping[str, Any]


def dialogue_of(figure: Figure, reply: str) -> tuple[dict[str, Any] | None, int]:
    """The training record of a figure and a teacher's reply, and how many answers were dropped.

    The record is None if the reply holds no question with its answer, or cleaning leaves none. Whether the picture
    stands before or behind the first question depends on the figure's id alone.
    """
    behind = bool(hashlib.sha256(str(figure["pair_id"]).encode()).digest()[0] & 1)
    made = formatted(figure, reply, image_behind=behind)
    if made is None:
        return None, 0
    turns = made["conversations"]
    spoken = [pair for pair in zip(turns[::2], turns[1::2], strict=True) if all(turn["value"].strip() for turn in pair)]
    kept = cleaned({**made, "conversations": [turn for pair in spoken for turn in pair]})
    count = 0 if kept is None else len(kept["conversations"]) // 2
    return None if kept is None else with_image(kept, image_behind=behind), len(turns) // 2 - count


def figure_dialogues(
    source: Path,
    output: Path,
    bad: Left,
    *,
    teacher: str,
    mentions: bool = True,
    examples: str | None = None,
    most: int | None = None,
    rounds: int = ROUNDS,
    base_url: str | None = None,
    api_key_env: str | None = None,
    concurrency: int | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
    max_cost: float | None = None,
) -> dict[str, Any]:
    """Preparation of dialogues from figures.

    Args:
        teacher: Address (`http://host:8000/v1#NAME`), model folder, or name of a model at `base_url`; the further
            options are those of `llavakit.generation.remote.APIClient`.
        mentions: Whether the teacher is shown the sentences that mention a figure.
        examples: File of figures with `conversations`, shown as answered requests.
        most: How many figures, taken from the domains in turn; default: all.
        rounds: How often (1 to 4) a figure is asked for whose call fails or whose reply cannot be read.

    Raises:
        UserError: If an option does not fit, or no figure can be read.
    """
    if not 1 <= rounds <= ROUNDS:
        raise UserError(f"rounds: must be 1 to {ROUNDS}, not {rounds}")
    shots = [] if examples is None else list(figures(Path(examples), Left(), shown=True))
    found = by_domain(list(figures(source, bad)), most)
    if not found:
        raise UserError(f"{source}: no figure could be read")
    asked = [(figure, request(figure, shots, mentions=mentions)) for figure in found]
    api = {"api_key_env": api_key_env, "price_in": price_in, "price_out": price_out, "max_cost": max_cost}
    given = {name: value for name, value in api.items() if value is not None}
    cache = output.with_suffix(".teacher.jsonl")
    with Judge(teacher, base_url, temperature=0.0, concurrency=concurrency, cache=cache, **given) as asker:
        records, counts = taught(asker, asked, rounds)
        by = {"teacher": asker.responder.name, "rules": VERSION, "mentions": mentions}
    written = write_records(output, ({**record, "provenance": {**record["provenance"], **by}} for record in records))
    return {"figures": len(found), "records": written, **counts}


def taught(
    asker: Judge, asked: Sequence[tuple[Figure, list[dict[str, str]]]], rounds: int
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The records of what a teacher writes, in order of the figures, and counts.

    Args:
        asked: Figures and the messages that ask for their dialogues.

    Returns:
        Records, and `dropped_answers`, `without_dialogue` (nothing is left of the reply), `unreadable` replies and
        `failed_calls` of the last round.

    Raises:
        APIRefused: If no call can be answered; what was answered is kept.
    """
    replies: dict[int, str | None] = {}
    waiting = list(range(len(asked)))
    for number in range(rounds):
        answers = asker.map(lambda place, attempt=number: asker.ask(asked[place][1], attempt=attempt), waiting)
        for place, answer in zip(waiting, answers, strict=True):
            replies[place] = None if isinstance(answer, CallFailed) else answer
        waiting = [
            place for place in waiting if replies[place] is None or formatted(asked[place][0], replies[place]) is None
        ]
        if not waiting:
            break
    counts: Counter[str] = Counter(dict.fromkeys(("dropped_answers", "without_dialogue", "unreadable"), 0))
    counts["failed_calls"] = sum(reply is None for reply in replies.values())
    counts["unreadable"] = len(waiting) - counts["failed_calls"]
    records = []
    for place, (figure, _) in enumerate(asked):
        if place in waiting:
            continue
        record, dropped = dialogue_of(figure, replies[place])
        counts["dropped_answers"] += dropped
        counts["without_dialogue"] += record is None
        if record is not None:
            shown = {name: figure.get(name) for name in ("fig_label", "fig_caption")}
            records.append({**record, "provenance": {**shown, "dropped_answers": dropped}})
    return records, counts


def figures(source: Path, bad: Left, *, shown: bool = False) -> Iterator[Figure]:
    """The figures of a file that can be asked about, each id once.

    Args:
        shown: Whether they are examples, which need a conversation and no id.

    Raises:
        RecordError: At the first one that cannot, unless `bad` leaves them out.
    """
    entries, seen = open_source(source), set()
    for number in range(len(entries)):
        try:
            figure = entries[number]
            place = (str(source), entries.line(number))
            if not isinstance(figure, Mapping):
                raise RecordError(*place, "record", f"is {quoted(figure)}, it should be an object")
            try:
                _check(figure, seen, shown)
                request(figure, [figure] if shown else [])
            except FieldError as error:
                raise RecordError(*place, error.field, error.problem) from None
        except RecordError as error:
            bad(error)
            continue
        yield figure


def _check(figure: Figure, seen: set[str], shown: bool) -> None:
    caption = figure.get("fig_caption")
    if isinstance(caption, str) and not caption.strip():
        raise FieldError("fig_caption", "is empty, so there is nothing to write about")
    if not isinstance(figure.get("domain"), Mapping | None):
        raise FieldError("domain", f"must be an object of flags, not {quoted(figure['domain'])}")
    if shown:
        if not figure.get("conversations"):
            raise FieldError("conversations", "is missing; an example shows how a dialogue should be")
        return
    name = figure.get("pair_id")
    if not isinstance(name, str) or not name.strip():
        raise FieldError("pair_id", f"must be a text, not {quoted(name)}")
    if name in seen:
        raise FieldError("pair_id", f"{quoted(name)} was used before")
    seen.add(name)
