"""Sentences that may be put into other reports, of a corpus of any size: on disk, in order, chosen by number.

A host may get what another report of its split, of another subject, says about a finding that the host does not assert.
Which sentences these are differs from host to host, so they are not listed but counted: sentences with the same labels
are counted block by block, and the n-th for a host is found by adding up the counts of the label sets that it may get.
Nothing here grows with the corpus but eight bytes per sentence and file mappings.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from llavakit.data.preparation import write_records
from llavakit.data.strict_json import read_json
from llavakit.systems.report_error_checking.damage import Donor
from llavakit.systems.report_error_checking.edits import rank

BLOCK = 512  # sentences that are counted together
_ROW = np.dtype([("offset", "<u8"), ("report", "<u4"), ("text", "<u4"), ("sentence", "<u4"), ("labels", "<u4")])
_OWN = np.dtype([("subject", "<u8"), ("row", "<u8")])


def subject_key(subject: str) -> int:
    """A number for a subject."""
    return rank(subject, "subject")


class DonorWriter:
    """Takes sentences in any order, and writes them in order of split, report and sentence.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = sqlite3.connect(folder / "donors.sqlite", isolation_level=None)
        self._rows.execute("PRAGMA journal_mode=OFF")
        self._rows.execute("PRAGMA synchronous=OFF")
        self._rows.execute("CREATE TABLE donors (split, report, sentence, subject, labels, number, text)")
        self._rows.execute("BEGIN")
        self._sets: dict[frozenset[str], int] = {}

    def add(
        self,
        number: int,
        split: str,
        subject: str,
        report_id: str,
        sentences: Iterable[tuple[int, str, frozenset[str]]],
    ) -> None:
        """Note the sentences of the `number`-th report: place, text, positive labels."""
        key = subject_key(subject) - (1 << 63)  # as SQLite holds it
        rows = [
            (split, report_id, place, key, self._sets.setdefault(labels, len(self._sets)), number, text)
            for place, text, labels in sentences
        ]
        self._rows.executemany("INSERT INTO donors VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def close(self, leave_out: Callable[[int], bool] = lambda number: False) -> dict[str, list[frozenset[str]]]:
        """Write what `DonorIndex` reads.

        Args:
            leave_out: Whether the sentences of a report are left out.

        Returns:
            The label sets that the sentences of every split have.
        """
        self._rows.execute("COMMIT")
        query = "SELECT split, report, sentence, subject, labels, number, text FROM donors ORDER BY 1, 2, 3"
        splits: dict[str, list[int]] = {}
        seen: dict[str, set[int]] = {}
        offset = count = 0
        with (self.folder / "donors.bin").open("wb") as texts, (self.folder / "donors.rows").open("wb") as rows:
            own = (self.folder / "donors.own").open("wb")
            for split, report, sentence, subject, labels, number, text in self._rows.execute(query):
                if leave_out(number):
                    continue
                parts = report.encode(), text.encode()
                lengths = tuple(map(len, parts))
                rows.write(np.array([(offset, *lengths, sentence, labels)], _ROW).tobytes())
                own.write(np.array([(subject + (1 << 63), count)], _OWN).tobytes())
                texts.write(b"".join(parts))
                offset += sum(lengths)
                splits.setdefault(split, [count, count])[1] = count + 1
                seen.setdefault(split, set()).add(labels)
                count += 1
            own.close()
        self._rows.close()
        (self.folder / "donors.sqlite").unlink()
        owners = np.fromfile(self.folder / "donors.own", _OWN)
        owners.sort(order=("subject", "row"))
        owners.tofile(self.folder / "donors.own")
        sets = list(self._sets)
        write_records(self.folder / "donors.json", [{"splits": splits, "sets": [sorted(own) for own in sets]}])
        return {split: [sets[number] for number in numbers] for split, numbers in seen.items()}


class DonorIndex:
    """The sentences of a corpus.

    Args:
        folder: What `DonorWriter` wrote.
    """

    def __init__(self, folder: Path) -> None:
        head = read_json(folder / "donors.json")[0]
        self.splits: dict[str, list[int]] = head["splits"]
        self.sets = [frozenset(labels) for labels in head["sets"]]
        self.rows, self.own = _mapped(folder / "donors.rows", _ROW), _mapped(folder / "donors.own", _OWN)
        self._texts = _mapped(folder / "donors.bin", np.dtype("u1"))
        self._blocks = {split: self._count(*span) for split, span in self.splits.items()}
        self.allowed = functools.lru_cache(maxsize=1024)(self._allowed)

    def _count(self, begin: int, end: int) -> np.ndarray:
        """Sentences by block and label set."""
        labels = self.rows["labels"][begin:end].astype(np.int64)
        blocks, width = -(-len(labels) // BLOCK), len(self.sets)
        flat = np.bincount(np.arange(len(labels)) // BLOCK * width + labels, minlength=blocks * width)
        return flat.reshape(blocks, width).astype(np.int32)

    def _allowed(self, split: str, asserted: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
        """Which label sets a host may get, and how many such sentences there are up to the end of every block."""
        which = np.array([not labels <= asserted for labels in self.sets], bool)
        return which, np.cumsum(self._blocks[split][:, which].sum(1))

    def for_host(self, split: str, subject: str, asserted: frozenset[str]) -> HostDonors:
        """The sentences that a report may get.

        Args:
            asserted: Labels that it asserts.
        """
        return HostDonors(self, split, subject, asserted)

    def at(self, row: int) -> Donor:
        """The sentence in a row."""
        offset, report, text, sentence, _ = self.rows[row].tolist()
        read = self._texts[offset : offset + report + text].tobytes()
        return Donor(read[:report].decode(), sentence, read[report:].decode())


class HostDonors:
    """The sentences that one report may get, in order of report and sentence; see `damage.Donors`."""

    def __init__(self, index: DonorIndex, split: str, subject: str, asserted: frozenset[str]) -> None:
        self.index = index
        self._begin, self._end = index.splits.get(split, (0, 0))
        self._length = 0
        if self._begin == self._end:
            return
        self._which, self._upto = index.allowed(split, asserted)
        key = np.uint64(subject_key(subject))
        first, last = (np.searchsorted(index.own["subject"], key, side) for side in ("left", "right"))
        rows = index.own["row"][first:last].astype(np.int64)
        rows = rows[(rows >= self._begin) & (rows < self._end)]
        self._own = [int(row) - self._begin for row in rows if self._which[index.rows["labels"][row]]]
        self._length = int(self._upto[-1]) - len(self._own)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Donor:
        if not 0 <= number < self._length:
            raise IndexError(number)
        for place in self._own:  # skip what the subject's own reports say
            if self._rank(place) > number:
                break
            number += 1
        block = int(np.searchsorted(self._upto, number, "right"))
        number -= int(self._upto[block - 1]) if block else 0
        fits = np.flatnonzero(self._fits(block * BLOCK, (block + 1) * BLOCK))
        return self.index.at(self._begin + block * BLOCK + int(fits[number]))

    def _rank(self, place: int) -> int:
        """How many sentences that the host may get come before a place."""
        block = place // BLOCK
        before = int(self._upto[block - 1]) if block else 0
        return before + int(self._fits(block * BLOCK, place).sum())

    def _fits(self, begin: int, end: int) -> np.ndarray:
        labels = self.index.rows["labels"][self._begin + begin : min(self._begin + end, self._end)]
        return self._which[labels]


def _mapped(file: Path, kind: np.dtype) -> np.ndarray:
    return np.memmap(file, kind, "r") if file.stat().st_size else np.zeros(0, kind)
