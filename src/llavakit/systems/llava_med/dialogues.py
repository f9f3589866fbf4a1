"""Dialogues about figures, written by a teacher from captions: the self-instruct data of the second stage.

    llavakit synthesize figure_dialogues figures.jsonl dialogues.json --teacher http://localhost:8000/v1#NAME

A figure has `pair_id`, `fig_label`, `fig_caption`, `in_text_mention` and `domain`. What a request says and what is kept
of a reply is in `instruct`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.data.readers import Source, open_source
from llavakit.errors import FieldError, RecordError, UserError, quoted
from llavakit.synthesis.pipeline import Pipeline, Refused, Teacher
from llavakit.systems.llava_med.instruct import IMAGE, cleaned, domain_of, formatted, in_turn, request, with_image

ROUNDS = 4
Figure = Mapping[str, Any]


class FigureDialogues(Pipeline):
    """Dialogues about figures whose captions a teacher reads.

    A figure whose reply cannot be read is asked about again; it becomes no record if no reply can, or if cleaning
    leaves no answer.

    Args:
        mentions: Whether the teacher is shown the sentences that mention a figure.
        examples: File of figures with `conversations`, shown as answered requests.
        most: How many figures, taken from the five domains in turn; default: all, in the order of the file.
        rounds: How often (1 to 4) a figure is asked about.

    Raises:
        UserError: If an option does not fit.
        RecordError: If an example cannot be shown.
    """

    temperature = 0.0
    max_tokens = 2048

    def __init__(
        self,
        *,
        mentions: bool = True,
        examples: str | None = None,
        most: int | None = None,
        rounds: int = ROUNDS,
    ) -> None:
        if not isinstance(mentions, bool):
            raise UserError(f"figure_dialogues: mentions must be true or false, not {quoted(mentions)}")
        if type(rounds) is not int or not 1 <= rounds <= ROUNDS:
            raise UserError(f"figure_dialogues: rounds must be 1 to {ROUNDS}, not {quoted(rounds)}")
        if most is not None and (type(most) is not int or most < 1):
            raise UserError(f"figure_dialogues: most must be a number of figures, not {quoted(most)}")
        self.mentions, self.most, self.rounds = mentions, most, rounds
        self.shots = [] if examples is None else read_examples(Path(examples))
        self.files = [] if examples is None else [hashlib.sha256(Path(examples).read_bytes()).hexdigest()]

    def items(self, source: Path) -> Source:
        """The figures of a file, or the domains in turn."""
        figures = open_source(source)
        return figures if self.most is None else InTurn(figures, self.most)

    def name(self, item: Any) -> Any:
        """A figure's `pair_id`."""
        return item.get("pair_id")

    def check(self, item: Any) -> None:
        """Refuse a figure without id, label or caption, or with flags or mentions of another form."""
        super().check(item)
        name = item.get("pair_id")
        if not isinstance(name, str) or not name.strip():
            raise FieldError("pair_id", f"must be a text, not {quoted(name)}")
        check_shown(item)

    def work(self, item: Figure, teacher: Teacher | None) -> Iterable[Mapping[str, Any]]:
        """The dialogue about a figure."""
        messages = request(item, self.shots, mentions=self.mentions)
        for attempt in range(self.rounds):
            reply = teacher.ask(messages, attempt=attempt)
            if formatted(item, reply) is not None:
                break
        record, dropped = dialogue_of(item, reply)
        if record is None:
            why = f"all {dropped} answers speak of the text" if dropped else "the reply holds no question and answer"
            raise Refused(why)
        shown = {name: item.get(name) for name in ("fig_label", "fig_caption")}
        origin = {**shown, "mentions": self.mentions, "dropped_answers": dropped, "rules": self.version}
        return [{**record, "provenance": origin}]


def dialogue_of(figure: Figure, reply: str) -> tuple[dict[str, Any] | None, int]:
    """The training record of a figure and a teacher's reply, and how many answers were dropped.

    The record is None if the reply holds no question with its answer, or cleaning leaves none. Whether the picture
    stands before or behind the first question depends on the figure's id alone.
    """
    behind = bool(hashlib.sha256(figure["pair_id"].encode()).digest()[0] & 1)
    made = formatted(figure, reply.replace(IMAGE, ""), image_behind=behind)  # a teacher asks for no picture
    if made is None:
        return None, 0
    turns = made["conversations"]
    spoken = [pair for pair in zip(turns[::2], turns[1::2], strict=True) if all(turn["value"].strip() for turn in pair)]
    kept = cleaned({**made, "conversations": [turn for pair in spoken for turn in pair]})
    count = 0 if kept is None else len(kept["conversations"]) // 2
    return None if kept is None else with_image(kept, image_behind=behind), len(turns) // 2 - count


def check_shown(figure: Figure) -> None:
    """Refuse a figure that cannot be shown to a teacher.

    Raises:
        FieldError: With the field that is wrong.
    """
    caption = figure.get("fig_caption")
    if isinstance(caption, str) and not caption.strip():
        raise FieldError("fig_caption", "is empty, so there is nothing to write about")
    if not isinstance(figure.get("domain"), Mapping | None):
        raise FieldError("domain", f"must be an object of flags, not {quoted(figure['domain'])}")
    request(figure)


def read_examples(path: Path) -> list[Figure]:
    """Figures with conversations.

    Raises:
        RecordError: At the first that cannot be shown.
    """
    entries, found = open_source(path), []
    for number in range(len(entries)):
        figure = entries[number]
        try:
            if not isinstance(figure, Mapping):
                raise FieldError("record", f"must be an object, not {type(figure).__name__}")
            if not figure.get("conversations"):
                raise FieldError("conversations", "is missing; an example shows how a dialogue should be")
            check_shown(figure)
            request(figure, [figure])
        except FieldError as error:
            raise RecordError(str(path), entries.line(number), error.field, error.problem) from None
        found.append(figure)
    return found


class InTurn(Source):
    """Entries of a source, taken from the domains in turn."""

    def __init__(self, source: Source, most: int) -> None:
        self.source, self.file = source, source.file
        domains = []
        for number in range(len(source)):
            try:
                domains.append(domain_of(source[number]))
            except RecordError:  # it is reported when it is worked on
                domains.append(None)
        self.indices = np.array(in_turn(domains, most), int)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.indices[index])]

    def line(self, index: int) -> int:
        return self.source.line(int(self.indices[index]))
