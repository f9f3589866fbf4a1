"""Dialogues for both models: the first learns from annotated evidence, and labels passages for the final one.

    llavakit prepare reflective_pairs evqa_train.jsonl data/first/train_multiturn_encyclopedic.json pages=pages.jsonl
    llavakit prepare reflective_labels infoseek_train.jsonl data/final/train_multiturn_infoseek.json \\
        pages=pages.jsonl judge=runs/reflectiva-in-article/final

Questions: JSONL of `question_id`, `image`, `text`, `answer` and `page`, and for the first `evidence`, the numbers of
the passages of the page that hold the answer. Pages are those that `llavakit index` reads. `reflective_list` makes a
training file of the dialogues.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.errors import RecordError, UserError
from llavakit.evaluation.records import Record, read_records
from llavakit.retrieval.pages import Page, Pages, open_pages
from llavakit.retrieval.passages import pack
from llavakit.retrieval.sentences import sentences
from llavakit.systems.reflectiva.prompts import DEFAULT, frame_of, judgement
from llavakit.systems.reflectiva.tokens import BEGIN, END, NO_RELEVANT, RELEVANT, RETRIEVAL, id_of

TOGETHER = 16  # passages that are judged in one forward pass


class Shelf:
    """Pages by name; only their names are kept in memory.

    Args:
        pages: The pages.

    Raises:
        UserError: If two pages have one name.
    """

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.numbers: dict[str, int] = {}
        for number in range(len(pages)):
            name = pages[number].name
            if name in self.numbers:
                raise UserError(f"{pages.file}: two pages are called {name!r}")
            self.numbers[name] = number

    def passages(self, question: Record) -> list[str]:
        """The passages of a question's page.

        Raises:
            RecordError: If there is no such page.
        """
        name = str(question.get("page", (str, int)))
        if name not in self.numbers:
            raise question.error("page", f"{self.pages.file} has no page {name!r}")
        return cut(self.pages[self.numbers[name]])

    def elsewhere(self, question: Record, draw: random.Random) -> str | None:
        """A passage of another page, None if there is none."""
        own = self.numbers[str(question.data["page"])]
        if len(self.numbers) < 2:
            return None
        number = draw.randrange(len(self.numbers) - 1)
        found = cut(self.pages[number + (number >= own)])
        return draw.choice(found) if found else None


def cut(page: Page) -> list[str]:
    """The passages of a page: those it was given, else its text in pieces of the published length."""
    return list(page.passages) or pack(sentences(page.text))


def dialogue(question: Record, passage: str, helps: bool, number: int) -> dict[str, Any]:
    """A question with a passage as a training dialogue; `reflective_list` puts the text around the paragraph."""
    text, answer = question.get("text", str), question.get("answer", str).split("|")[0]
    verdict = RELEVANT + answer if helps else NO_RELEVANT
    turns = [f"<image>\n{text}", RETRIEVAL, f"{BEGIN}{passage.strip()}{END}", verdict]
    name = f"{question.id}-{number}"
    return {
        "id": name,
        "unique_id": name,
        "__key__": name,
        "image": question.get("image", str),
        "conversations": [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(turns)],
    }


def numbered(question: Record, labelled: Sequence[tuple[str, bool]]) -> Iterator[dict[str, Any]]:
    """The dialogues of a question."""
    for number, (passage, helps) in enumerate(labelled):
        yield dialogue(question, passage, helps, number)


def evidence_of(question: Record, count: int) -> list[int]:
    """Numbers of the passages with the evidence.

    Raises:
        RecordError: If they are none of the page's.
    """
    given = question.get("evidence", (int, list))
    found = given if isinstance(given, list) else [given]
    if not found or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < count for n in found):
        raise question.error("evidence", f"must be numbers of passages from 0 to {count - 1}")
    return found


def reflective_pairs(
    source: Path, output: Path, bad: Left, *, pages: Path, negatives: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Preparation of the first model's dialogues: evidence, and other passages of the same page.

    Args:
        pages: What `llavakit index` reads; `evidence` counts the passages of a page.
        negatives: Other passages per passage with evidence.
        seed: Of the choice.
    """
    shelf, draw = Shelf(open_pages(pages)), random.Random(seed)
    made: list[dict[str, Any]] = []
    questions = read_records(source, bad)
    for question in questions:
        try:
            passages = shelf.passages(question)
            evidence = evidence_of(question, len(passages))
            others = [text for number, text in enumerate(passages) if number not in evidence]
            chosen = draw.sample(others, min(negatives * len(evidence), len(others)))
            labelled = [(passages[number], True) for number in evidence] + [(text, False) for text in chosen]
            made += numbered(question, labelled)
        except RecordError as error:
            bad(error)
    helping = sum(record["conversations"][3]["value"].startswith(RELEVANT) for record in made)
    return {"records": write_records(output, made), "questions": len(questions), "relevant": helping}


def reflective_labels(
    source: Path,
    output: Path,
    bad: Left,
    *,
    pages: Path,
    judge: str,
    images: Path | None = None,
    elsewhere: int = 1,
    template_paragraph: str = DEFAULT,
    seed: int = 0,
) -> dict[str, Any]:
    """Preparation of the final model's dialogues: the first model says which passages of a question's page help.

    Per question: the passage that helps most surely, one of the same page that does not, and passages of other pages.
    Questions without a passage that helps are left out. Verdicts are kept beside the output (`.verdicts.jsonl`), and
    the same call goes on after a kill.

    Args:
        pages: What `llavakit index` reads.
        judge: The first model: a folder or hub id.
        images: Folder that image names are relative to; by default that of the questions.
        elsewhere: Passages of other pages per question.
        template_paragraph: Name of the text around a passage, see `prompts.FRAMES`.
        seed: Of the choice.
    """
    shelf, draw = Shelf(open_pages(pages)), random.Random(seed)
    folder, verdicts = images or source.parent, Verdicts(output.with_suffix(".verdicts.jsonl"), judge)
    made: list[dict[str, Any]] = []
    questions, without = read_records(source, bad), 0
    for question in questions:
        try:
            passages = shelf.passages(question)
            sure = verdicts.of(question, passages, folder, template_paragraph)
            helping = [number for number, value in enumerate(sure) if value > 0]
            if not helping:
                without += 1
                continue
            others = [text for text, value in zip(passages, sure, strict=True) if value <= 0]
            labelled = [(passages[max(helping, key=sure.__getitem__)], True)]
            labelled += [(draw.choice(others), False)] if others else []
            found = [shelf.elsewhere(question, draw) for _ in range(elsewhere)]
            labelled += [(text, False) for text in found if text is not None]
            made += numbered(question, labelled)
        except RecordError as error:
            bad(error)
    return {"records": write_records(output, made), "questions": len(questions), "without": without}


class Verdicts:
    """What the first model says of passages, kept in a file.

    Args:
        path: The file; verdicts in it are not asked for again.
        judge: The model.
    """

    def __init__(self, path: Path, judge: str) -> None:
        self.path, self.judge = path, judge
        self.known = {}
        if path.is_file():
            # a kill may have torn the last line, which is then asked for again
            rows = read_records(path, lambda error: None)
            self.known = {row.data["question_id"]: row.data["sure"] for row in rows if row.data["judge"] == judge}
        self._model: Any = None

    def of(self, question: Record, passages: Sequence[str], folder: Path, template_paragraph: str) -> list[float]:
        """By how much "helps" is likelier than "does not" for every passage, as a difference of logits."""
        known = self.known.get(question.id)
        if known is None or len(known) != len(passages):
            known = self._ask(question, passages, folder, template_paragraph)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            row = {"question_id": question.id, "judge": self.judge, "sure": known}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return known

    def _ask(self, question: Record, passages: Sequence[str], folder: Path, template_paragraph: str) -> list[float]:
        if self._model is None:
            from llavakit.generation.load import load

            self._model = load(self.judge, responder="plain")
            self._pair = [id_of(token, self._model.tokenizer) for token in (RELEVANT, NO_RELEVANT)]
        picture = {"type": "image", "image": str(folder / question.get("image", str))}
        text = {"type": "text", "text": question.get("text", str)}
        asked = [{"role": "user", "content": [picture, text]}]
        frame, found = frame_of(template_paragraph), []
        for begin in range(0, len(passages), TOGETHER):
            group = [judgement(asked, passage, frame) for passage in passages[begin : begin + TOGETHER]]
            try:
                logits = self._model.next_logits(group)[:, self._pair].float()
            except UserError as error:
                raise question.error("image", str(error)) from None
            found += (logits[:, 0] - logits[:, 1]).tolist()
        return found
