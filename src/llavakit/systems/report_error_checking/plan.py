"""Which reports of a corpus are damaged, and by what: half of every split, the three operations in equal shares.

The plan depends on the seed and on what the reports are, not on their order: they are ranked by digests of their ids.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.errors import UserError
from llavakit.systems.report_error_checking.damage import OPERATIONS
from llavakit.systems.report_error_checking.edits import pick, rank

CONTROL, UNUSABLE, REPEATED = 0, 254, 255  # other numbers: 1 + the operation that is tried first
REMOVE, SUBSTITUTE = 1, 2  # operations that a report has candidates of, as bits


def report_key(report_id: str) -> int:
    """A number for a report."""
    return rank(report_id, "report")


class Census:
    """Reports as they are seen, in a few bytes each.

    Args:
        seed: Of the corpus.
        share: Of the reports of a split that are damaged.
        repeated: Whether a report with another's text is left out.
    """

    def __init__(self, seed: int, share: float, repeated: bool) -> None:
        self.seed, self.share, self.repeated = seed, share, repeated
        self.numbers, self.keys, self.subjects = array("q"), array("Q"), array("Q")
        self.texts, self.ranks, self.starts = array("Q"), array("Q"), array("B")
        self.bits, self.splits, self.labels = array("B"), array("I"), array("I")
        self.split_names: dict[str, int] = {}
        self.label_sets: dict[frozenset[str], int] = {}

    def add(self, number: int, report_id: str, subject: str, split: str, seen: Mapping[str, Any]) -> None:
        """Note a report.

        Args:
            number: Of the item.
            seen: `text` (a number for its text), `bits`, `asserted` (labels).
        """
        self.numbers.append(number)
        self.keys.append(report_key(report_id))
        self.subjects.append(rank(subject, "subject"))
        self.texts.append(seen["text"])
        self.ranks.append(rank(self.seed, report_id, "half"))
        self.starts.append(pick(self.seed, report_id, "choose", 0, len(OPERATIONS)))
        self.bits.append(seen["bits"])
        self.splits.append(self.split_names.setdefault(split, len(self.split_names)))
        self.labels.append(self.label_sets.setdefault(seen["asserted"], len(self.label_sets)))

    def check(self, file: str) -> None:
        """Refuse ids that two reports share, and subjects in two splits.

        Raises:
            UserError: With the numbers of the records.
        """
        numbers = np.asarray(self.numbers)
        keys = np.asarray(self.keys)
        for first, second in _neighbours(keys, keys):
            raise UserError(f"{file}: records {numbers[first] + 1} and {numbers[second] + 1} have the same report_id")
        subjects, splits = np.asarray(self.subjects), np.asarray(self.splits)
        order = np.lexsort((splits, subjects))
        same = (subjects[order][1:] == subjects[order][:-1]) & (splits[order][1:] != splits[order][:-1])
        for place in np.flatnonzero(same)[:1]:
            first, second = sorted(numbers[order[place : place + 2]] + 1)
            raise UserError(
                f"{file}: records {first} and {second} are of one subject in two splits; split by subject, or leave "
                "the field split out"
            )

    def repeats(self) -> np.ndarray:
        """Whether a report repeats the text of another, which comes before it by its key."""
        found = np.zeros(len(self.keys), bool)
        if self.repeated:
            texts = np.asarray(self.texts)
            order = np.lexsort((np.asarray(self.keys), texts))
            found[order[1:]] = texts[order][1:] == texts[order][:-1]
        return found

    def write(self, folder: Path, donors: Mapping[str, Iterable[frozenset[str]]]) -> None:
        """Make the plan, and write what `Plan` reads.

        Args:
            donors: The label sets of the sentences that each split offers.
        """
        repeats, plan = self.repeats(), np.zeros(len(self.keys), np.uint8)
        plan[repeats] = REPEATED
        splits, ranks = np.asarray(self.splits), np.asarray(self.ranks)
        names, sets = list(self.split_names), list(self.label_sets)
        for split, name in enumerate(names):
            offered = list(donors.get(name, ()))
            insert = np.array([any(not own <= asserted for own in offered) for asserted in sets], bool)
            members = np.flatnonzero((splits == split) & ~repeats)
            self._plan_split(plan, members[np.argsort(ranks[members], kind="stable")], insert)
        order = np.argsort(np.asarray(self.keys))
        np.asarray(self.keys)[order].tofile(folder / "plan.keys")
        plan[order].tofile(folder / "plan.codes")
        counts = {"reports": len(plan), "repeated": int(repeats.sum())}
        (folder / "plan.json").write_text(json.dumps(counts))

    def _plan_split(self, plan: np.ndarray, members: np.ndarray, insert: np.ndarray) -> None:
        """Plan the reports of one split, in order of their ranks."""
        wanted, counts = int(len(members) * self.share), [0] * len(OPERATIONS)
        for place in members.tolist():
            bits = self.bits[place]
            fits = (bool(insert[self.labels[place]]), bool(bits & REMOVE), bool(bits & SUBSTITUTE))
            if not any(fits):
                plan[place] = UNUSABLE
                continue
            if sum(counts) == wanted:
                continue
            start = self.starts[place]
            ops = [(start + step) % len(OPERATIONS) for step in range(len(OPERATIONS))]
            chosen = min((op for op in ops if fits[op]), key=lambda op: counts[op])
            counts[chosen] += 1
            plan[place] = 1 + chosen


def _neighbours(values: np.ndarray, same: np.ndarray) -> Iterable[tuple[int, int]]:
    """Places of equal values, two at a time."""
    order = np.argsort(values, kind="stable")
    for place in np.flatnonzero(same[order][1:] == same[order][:-1]):
        yield int(order[place]), int(order[place + 1])


class Plan:
    """The plan of a corpus, as `Census` wrote it."""

    def __init__(self, folder: Path) -> None:
        self.keys = np.fromfile(folder / "plan.keys", np.uint64)
        self.codes = np.fromfile(folder / "plan.codes", np.uint8)

    def of(self, report_id: str) -> int:
        """What is planned for a report: `CONTROL`, `UNUSABLE`, `REPEATED`, or 1 + the first operation."""
        return int(self.codes[np.searchsorted(self.keys, np.uint64(report_key(report_id)))])
