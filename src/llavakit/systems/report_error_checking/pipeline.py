"""The pipeline `report_errors`: reports become records with mistakes of known kind and place, and records without.

    llavakit synthesize report_errors reports.jsonl checks.jsonl seed=1 only=train --processes 8

A report is `report_id`, `subject_id`, `findings` (or `text`) and `image`, optionally `study_id` and `split`. Half of
every split is damaged, in equal shares by insertion, removal and substitution; a damaged report carries its provenance.
No teacher is asked. Source: spec section 4.4.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.errors import FieldError, UserError, quoted
from llavakit.synthesis.pipeline import Pipeline, Refused, Teacher
from llavakit.systems.report_error_checking.damage import (
    Damaged,
    damage,
    donor_sentences,
    remove_candidates,
    substitute_candidates,
)
from llavakit.systems.report_error_checking.donors import DonorIndex, DonorWriter
from llavakit.systems.report_error_checking.edits import rank
from llavakit.systems.report_error_checking.plan import CONTROL, REMOVE, REPEATED, SUBSTITUTE, UNUSABLE, Census, Plan
from llavakit.systems.report_error_checking.prompts import TYPES, complex_prompt, conversation, simple_prompt
from llavakit.systems.report_error_checking.reading import Reading, normalised, read
from llavakit.systems.report_error_checking.tables import VERSION, Tables

LEVELS = ("both", "simple", "complex")
_IDS = ("report_id", "subject_id", "study_id", "split")


class ReportErrors(Pipeline):
    """Records of both levels from a corpus of reports.

    Args:
        seed: Other seeds damage other reports in other places.
        level: "simple" (is there a mistake), "complex" (of which kind; damaged reports only), or "both".
        only: Write the records of this split only; the others are read, since splits are halved one by one.
        splits: Shares of splits for reports that name none, as "train=0.8,test=0.2"; subjects stay together.
        share: Of the reports of a split that are damaged.
        twins: Whether a damaged report is also there as it was.
        repeated: Whether reports with another's text are left out ("refuse") or kept ("keep").
        pictures: False for records of text alone.
        tables: JSON file of tables in place of the recommended ones, see `tables.Tables`.

    Raises:
        UserError: If an option does not fit.
    """

    version = VERSION
    asks = False
    surveys = True

    def __init__(
        self,
        *,
        seed: int = 0,
        level: str = "both",
        only: str | None = None,
        splits: str | None = None,
        share: float = 0.5,
        twins: bool = False,
        repeated: str = "refuse",
        pictures: bool = True,
        tables: str | None = None,
    ) -> None:
        for name, value, known in (("level", level, LEVELS), ("repeated", repeated, ("refuse", "keep"))):
            if value not in known:
                raise UserError(f"report_errors: {name} must be {' or '.join(known)}, not {quoted(value)}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UserError(f"report_errors: seed must be an integer, not {quoted(seed)}")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise UserError(f"report_errors: share must be from 0 to 1, not {quoted(share)}")
        for name, value in (("twins", twins), ("pictures", pictures)):
            if not isinstance(value, bool):
                raise UserError(f"report_errors: {name} must be true or false, not {quoted(value)}")
        self.seed, self.level, self.only, self.share, self.twins = seed, level, only, float(share), twins
        self.splits = _shares(splits)
        self.drops_repeated, self.pictures = repeated == "refuse", pictures
        self.tables = Tables() if tables is None else Tables.read(tables)
        self.files = [] if tables is None else [self.tables.digest]
        self._file = "reports"

    def items(self, source: Path) -> Any:
        """The reports of a .json or .jsonl file."""
        items = super().items(source)
        self._file = items.file
        return items

    def check(self, item: Any) -> None:
        """Refuse a report without ids, text or picture."""
        super().check(item)
        for name in ("report_id", "subject_id", "study_id"):
            value = item.get(name)
            if value in (None, "") and name != "study_id":
                raise FieldError(name, "is missing; give a name")
            if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
                raise FieldError(name, "must be a text or number")
        for name in ("findings", "text", "split"):
            if item.get(name) is not None and not isinstance(item[name], str):
                raise FieldError(name, "must be a text")
        if item.get("findings") is None and item.get("text") is None:
            raise FieldError("findings", "is missing; give the findings section as findings or text")
        image = item.get("image")
        if self.pictures and not (isinstance(image, str) and image):
            raise FieldError("image", "must be the name of the picture; pictures=false makes records of text alone")
        self._split(item)

    def name(self, item: Any) -> Any:
        """A report's id."""
        return item.get("report_id")

    def _split(self, item: Mapping[str, Any]) -> str:
        """The split of a report: its own, or the one of its subject by the shares."""
        if item.get("split"):
            return item["split"]
        if not self.splits:
            raise FieldError("split", "is missing; name it, or give splits=train=0.8,test=0.2")
        place = rank(self.seed, str(item["subject_id"]), "split") / 2**64
        for split, upto in self.splits:
            if place < upto:
                return split
        return self.splits[-1][0]

    def _text(self, item: Mapping[str, Any]) -> str:
        return item["text"] if item.get("findings") is None else item["findings"]

    # ------------------------------------------------------------------ before the work

    def survey(self, number: int, item: Any) -> Any:
        """What the plan and the donors need of a report; None if it has no text."""
        report = read(self._text(item), self.tables)
        if not report.text:
            return None
        bits = (REMOVE if remove_candidates(report) else 0) | (
            SUBSTITUTE if substitute_candidates(report, self.tables) else 0
        )
        donors = [(place, report.sentence(place), labels) for place, labels in donor_sentences(report, self.tables)]
        seen = {"text": rank(report.text, "text"), "bits": bits, "asserted": report.asserted}
        return number, str(item["report_id"]), str(item["subject_id"]), self._split(item), seen, donors

    def gather(self, found: Iterator[Any], folder: Path) -> None:
        """Write the plan and the donors' sentences.

        Raises:
            UserError: If two reports have one id, or a subject is in two splits.
        """
        census, donors = Census(self.seed, self.share, self.drops_repeated), DonorWriter(folder)
        for row in found:
            if row is None:
                continue
            number, report_id, subject, split, seen, sentences = row
            census.add(number, report_id, subject, split, seen)
            if sentences:
                donors.add(len(census.keys) - 1, split, subject, report_id, sentences)
        census.check(self._file)
        repeats = census.repeats()
        census.write(folder, donors.close(lambda place: bool(repeats[place])))

    def open(self, folder: Path) -> None:
        """Map the plan and the donors."""
        self._plan, self._donors = Plan(folder), DonorIndex(folder)

    # ------------------------------------------------------------------ the work

    def work(self, item: Any, teacher: Teacher | None) -> Iterable[Mapping[str, Any]]:
        """The records of a report."""
        text, report_id = normalised(self._text(item)), str(item["report_id"])
        if not text:
            raise Refused("the report has no findings")
        code = self._plan.of(report_id)
        if code == REPEATED:
            raise Refused("another report has the same text; repeated=keep keeps it")
        split = self._split(item)
        if self.only not in (None, split):
            return []
        if code in (CONTROL, UNUSABLE):
            note = {"unusable": "no operation has a candidate"} if code == UNUSABLE else {}
            return self._original(item, split, text, note)
        report = read(text, self.tables)
        donors = self._donors.for_host(split, str(item["subject_id"]), report.asserted)
        found = damage(report, report_id, self.seed, donors, self.tables, first=code - 1)
        if found.label is None:
            return self._original(item, split, text, {"unusable": "no operation has a candidate"})
        records = self._damaged(item, split, report, found)
        return [*self._original(item, split, text, {}), *records] if self.twins else records

    def _record(self, item: Any, split: str, kind: str, prompt: str, answer: str, **more: Any) -> dict[str, Any]:
        ids = {name: str(item[name]) for name in _IDS if item.get(name) is not None}
        picture = {"image": item["image"]} if self.pictures else {}
        return {
            "id": f"{ids['report_id']}_{kind}",
            **picture,
            "conversations": conversation(prompt, answer, self.pictures),
            "level": "complex" if kind == "type" else "simple",
            **ids,
            "split": split,
            **more,
        }

    def _original(self, item: Any, split: str, text: str, note: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The record of a report as it was."""
        if self.level == "complex":
            return []
        return [self._record(item, split, "original", simple_prompt(text), "N", **note)]

    def _damaged(self, item: Any, split: str, report: Reading, found: Damaged) -> list[dict[str, Any]]:
        """The records of a damaged report."""
        ids = {name: str(item[name]) for name in _IDS if item.get(name) is not None}
        provenance = {
            **ids,
            **({"image": item["image"]} if self.pictures else {}),
            "split": split,
            "seed": self.seed,
            "generator": self._generator,
            **found.provenance(),
        }
        made = functools.partial(self._record, item, split, provenance=provenance)
        records = []
        if self.level != "complex":
            records.append(made("damaged", simple_prompt(found.modified), "Y"))
        if self.level != "simple":
            records.append(made("type", complex_prompt(found.modified), TYPES[found.label]))
        return records

    @property
    def _generator(self) -> dict[str, Any]:
        return {"name": "report_errors", "version": VERSION, "tables": self.tables.digest}


def _shares(text: str | None) -> list[tuple[str, float]]:
    """Splits and where each ends between 0 and 1.

    Raises:
        UserError: If the text is not NAME=SHARE,..., with shares that add up to 1.
    """
    if text is None:
        return []
    found, upto = [], 0.0
    for entry in str(text).split(","):
        name, _, share = entry.strip().partition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not name or not 0 <= value <= 1:
            raise UserError(f"report_errors: splits must be as train=0.8,test=0.2, not {quoted(text)}")
        upto += value
        found.append((name, upto))
    if abs(upto - 1) > 1e-6:
        raise UserError(f"report_errors: the shares of splits add up to {upto:g}, not to 1")
    return found
