"""Triplets `SUBJECT suggestive_of OBJECT`: read, written, counted, and put together to captions of pictures.

A file of triplets is a list of records with `img_id`, `split` and `triplets`, as the published notebook reads it: one
string, or a list of strings or of `[subject, relation, object]`. Records may name `study_id` and `patient_ID` too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llavakit.data.readers import open_source
from llavakit.errors import RecordError, UserError, quoted
from llavakit.systems.kg_llava.radgraph import RELATIONS, suggestions

RELATION = "suggestive_of"
JOINED = "; "
_SPELT = re.compile(r"\s+(suggestive[ _]of|located[ _]at|modify)\s+")
_OWNERS = {"study": ("study_id", "study_ID", "report_ID"), "patient": ("patient_ID", "patient_id", "subject_id")}


class Triplet(NamedTuple):
    """A relation that RadGraph found."""

    subject: str
    relation: str
    object: str

    def __str__(self) -> str:
        return f"{self.subject} {self.relation} {self.object}"


def parse(text: str) -> list[Triplet]:
    """The triplets of a caption; `suggestive of` and `suggestive_of` are the same.

    Raises:
        UserError: If a part of it is no triplet, or its relation is not one of RadGraph's.
    """
    found = []
    for part in text.split(";"):
        part = part.strip().removesuffix(".").strip()
        if not part:
            continue
        pieces = _SPELT.split(f" {part} ".replace("\n", " "))
        if len(pieces) != 3 or not pieces[0].strip() or not pieces[2].strip():
            unknown = re.search(r"\S+_\S+", part)
            what = f"relation {quoted(unknown[0])} is unknown" if unknown and len(pieces) == 1 else "is no triplet"
            raise UserError(f"{quoted(part)}: {what}; write SUBJECT suggestive_of OBJECT")
        found.append(Triplet(pieces[0].strip(), pieces[1].replace(" ", "_"), pieces[2].strip()))
    return found


@dataclass(frozen=True)
class Caption:
    """The triplets of one training picture, as they are stored and put into prompts.

    Attributes:
        text: As prompts show it.
        image: The picture's id.
        owners: `study` and `patient`, where the record names them.
    """

    text: str
    image: str
    owners: Mapping[str, str] = field(default_factory=dict)

    @property
    def patient(self) -> str:
        """Whose it is, as well as is known: the patient, else the study, else the picture."""
        return self.owners.get("patient") or self.owners.get("study") or self.image


def read_captions(
    source: str | Path, *, split: str = "train", join: bool = True, unique: bool = False, least_patients: int = 1
) -> list[Caption]:
    """Captions of the pictures of one split, in the order of the file.

    Args:
        source: A file of triplets, or RadGraph's output (a list of annotations, whose ids count as pictures).
        split: Records of other splits are left out; records without one are taken.
        join: One caption per picture, its triplets joined by `; `; otherwise one per triplet.
        unique: Keep the first of equal captions of a picture.
        least_patients: Leave out triplets that occur in fewer patients: what only one patient has may point to them.

    Raises:
        RecordError: Naming the first record that is not in order.
        UserError: If nothing is left.
    """
    if least_patients < 1:
        raise UserError(f"least_patients {quoted(least_patients)}: at least one")
    rows = [row for row in _rows(source) if row[3] in (None, split)]
    if least_patients > 1:
        rows = _frequent(rows, least_patients)
    captions = []
    for image, texts, owners, _ in rows:
        parts = [JOINED.join(texts)] if join and texts else texts
        parts = dict.fromkeys(parts) if unique else parts
        captions += [Caption(text, image, owners) for text in parts]
    if not captions:
        raise UserError(f"{source}: no triplets of the split {quoted(split)}, so there is nothing to store")
    return captions


Row = tuple[str, list[str], dict[str, str], str | None]


def _rows(source: str | Path) -> Iterator[Row]:
    """Picture, texts, owners and split of every record."""
    entries = open_source(source)
    for number in range(len(entries)):
        record, line = entries[number], entries.line(number)

        def refuse(key: str, problem: str, line: int = line) -> RecordError:
            return RecordError(str(source), line, key, problem)

        if not isinstance(record, Mapping):
            raise refuse("record", f"is {quoted(record)}; must be an object with img_id and triplets")
        graph = next((value for value in record.values() if isinstance(value, Mapping) and "entities" in value), None)
        if graph is not None:
            yield str(record.get("img_id", number)), _of_graph(graph, refuse), owners(record), record.get("split")
            continue
        image = record.get("img_id")
        if isinstance(image, bool) or not isinstance(image, (str, int)):
            raise refuse("img_id", f"is {quoted(image)}; must be the picture's id")
        if "triplets" not in record:
            continue
        yield str(image), _texts(record["triplets"], refuse), owners(record), record.get("split")


def _of_graph(graph: Mapping[str, Any], refuse: Any) -> list[str]:
    try:
        return [str(Triplet(subject, RELATION, target)) for subject, target in suggestions(graph)]
    except UserError as error:
        raise refuse("entities", str(error)) from None


def _texts(value: Any, refuse: Any) -> list[str]:
    """The strings of a record's triplets; a single string stays as it is written."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence):
        raise refuse("triplets", f"is {quoted(value)}; must be text or a list")
    texts = []
    for place, item in enumerate(items):
        where = f"triplets.{place}" if items is value else "triplets"
        if isinstance(item, str):
            try:
                kinds = [triplet.relation for triplet in parse(item)]
            except UserError as error:
                raise refuse(where, str(error)) from None
        elif isinstance(item, Sequence) and len(item) == 3 and all(isinstance(part, str) for part in item):
            kinds = [item[1].replace(" ", "_")]
            item = str(Triplet(item[0], kinds[0], item[2]))
        else:
            raise refuse(where, f"is {quoted(item)}; must be text or [subject, relation, object]")
        unknown = [kind for kind in kinds if kind not in RELATIONS]
        if unknown:
            raise refuse(where, f"relation {quoted(unknown[0])} is unknown; known: {', '.join(RELATIONS)}")
        if kinds and all(kind == RELATION for kind in kinds):
            texts.append(item)
        elif kinds:  # the other relations of RadGraph are no knowledge of diseases
            kept = [str(one) for one in parse(item) if one.relation == RELATION]
            texts += [JOINED.join(kept)] if kept else []
    return texts


def owners(record: Mapping[str, Any]) -> dict[str, str]:
    """`study` and `patient` of a record, where it names them."""
    found = {
        kind: next((record[key] for key in keys if record.get(key) not in (None, "")), None)
        for kind, keys in _OWNERS.items()
    }
    return {kind: str(value) for kind, value in found.items() if value is not None}


def _frequent(rows: Iterable[Row], least: int) -> list[Row]:
    """Rows with the triplets that at least so many patients have."""
    rows = list(rows)
    patients: dict[str, set[str]] = {}
    for image, texts, owners, _ in rows:
        for text in texts:
            for triplet in parse(text):
                patients.setdefault(str(triplet), set()).add(Caption("", image, owners).patient)
    kept = []
    for image, texts, owners, split in rows:
        left = [[str(one) for one in parse(text) if len(patients[str(one)]) >= least] for text in texts]
        kept.append((image, [JOINED.join(parts) for parts in left if parts], owners, split))
    return kept
