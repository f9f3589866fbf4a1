"""LLaVA-Rad's annotation files as training records: which studies are kept, and what is asked.

    llavakit prepare mimic_cxr_findings chat_train_MIMIC_CXR_all_gpt4extract_rulebased_v1.json train.json
    llavakit prepare mimic_cxr_findings chat_test_MIMIC_CXR_all_gpt4extract_rulebased_v1.json test.json \\
        selection=mimic_test_findings

A record is LLaVA's, with `view`, `reason` (the indication) and `generate_method` (how the findings section was found:
by rules, or by GPT-4) beside the conversation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.data.readers import open_source
from llavakit.errors import RecordError, UserError, quoted
from llavakit.registry import nearest

FRONTAL = ("AP", "PA")
ASK = "Provide a description of the findings in the radiology image"
ASK_VIEW = "Given the chest X-ray image from {view} view, describe the findings in the image: "
ROOT = "mimic/"

Raw = Mapping[str, Any]


def _findings(record: Raw) -> dict[str, Any] | None:
    """A frontal study with its indication as the question."""
    kept = _frontal(record)
    if kept is None:
        return None
    reason = record.get("reason")
    given = "." if reason is None else " given the following indication: " + reason.replace("\n", " ")
    return _asking({**kept, "image": kept["image"].removeprefix(ROOT)}, ASK + given)


def _rule_based(record: Raw) -> dict[str, Any] | None:
    """The same, if rules found its findings: no text of GPT-4 is a reference."""
    return _findings(record) if record.get("generate_method") == "rule-based" else None


def _frontal(record: Raw) -> dict[str, Any] | None:
    """A frontal study with the file's own question."""
    if record.get("view") not in FRONTAL or not _has_findings(record):
        return None
    return copy.deepcopy(dict(record))


def _any_view(record: Raw) -> dict[str, Any] | None:
    """A study from any side, which the question names."""
    if not _has_findings(record):
        return None
    view = record.get("view")
    return _asking(copy.deepcopy(dict(record)), ASK_VIEW.format(view="Unknown" if view is None else view))


def _as_it_is(record: Raw) -> dict[str, Any] | None:
    return dict(record)


SELECTIONS: dict[str, Callable[[Raw], dict[str, Any] | None]] = {
    "mimic_train_findings": _findings,
    "mimic_test_findings": _rule_based,
    "mimic_cxr_all_frontal_findings": _frontal,
    "mimic_cxr_all_views_findings": _any_view,
    "default": _as_it_is,
}


def mimic_cxr_findings(
    source: Path, output: Path, bad: Left, *, selection: str = "mimic_train_findings"
) -> dict[str, Any]:
    """Records of LLaVA-Rad's annotation files (`llava-rad-mimic-cxr-annotation` on PhysioNet).

    Args:
        selection: Which studies are kept and what is asked, by the authors' names: `mimic_train_findings` and
            `mimic_test_findings` (frontal, with the indication, `mimic/` cut off the image's path; the latter only
            sections found by rules),
            `mimic_cxr_all_frontal_findings`, `mimic_cxr_all_views_findings`, `default` (as they are).
    """
    if selection not in SELECTIONS:
        raise UserError(f"selection: must be one of {', '.join(SELECTIONS)}{nearest(selection, list(SELECTIONS))}")
    entries = open_source(source)

    def kept() -> Iterator[dict[str, Any]]:
        for number in range(len(entries)):
            try:
                record = entries[number]
                _check(record, str(source), entries.line(number))
            except RecordError as error:
                bad(error)
                continue
            chosen = SELECTIONS[selection](record)
            if chosen is not None:
                yield chosen

    written = write_records(output, kept())
    return {"records": len(entries), "written": written}


def _has_findings(record: Raw) -> bool:
    return isinstance(record["conversations"][1]["value"], str)


def _asking(record: dict[str, Any], question: str) -> dict[str, Any]:
    record["conversations"][0]["value"] = f"<image>\n{question}"
    return record


def _check(record: Any, file: str, line: int) -> None:
    """The fields that a selection reads.

    Raises:
        RecordError: Naming the first that is not as it should be.
    """

    def refuse(field: str, value: Any, wanted: str) -> None:
        raise RecordError(file, line, field, f"is {quoted(value)}, it should be {wanted}")

    if not isinstance(record, Mapping):
        refuse("record", record, "an object")
    turns = record.get("conversations")
    whole = isinstance(turns, list) and len(turns) >= 2 and all(isinstance(t, Mapping) and "value" in t for t in turns)
    if not whole:
        refuse("conversations", turns, "a list of a question and its findings, each with a value")
    if not isinstance(record.get("image"), str):
        refuse("image", record.get("image"), "the path of the picture")
    for field in ("view", "reason"):
        if not isinstance(record.get(field), str | None):
            refuse(field, record[field], "text or null")
