"""What the generator knows of language: findings and their names, words that can be exchanged, patterns. Spec 4.4."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llavakit.data.strict_json import read_json
from llavakit.errors import UserError, quoted

VERSION = 1  # of the rules; part of every provenance record

LEXICON: Mapping[str, Sequence[str]] = {
    "atelectasis": ("atelectasis", "atelectatic changes"),
    "cardiomegaly": ("cardiomegaly", "enlarged heart"),
    "consolidation": ("consolidation", "consolidations"),
    "edema": ("edema",),
    "effusion": ("pleural effusion", "pleural effusions", "effusion", "effusions"),
    "fracture": ("fracture", "fractures"),
    "nodule": ("nodule", "nodules"),
    "opacity": ("opacity", "opacities"),
    "pneumonia": ("pneumonia",),
    "pneumothorax": ("pneumothorax", "pneumothoraces"),
}
SUBSTITUTIONS: Mapping[str, Mapping[str, str]] = {
    "laterality": {"left": "right", "right": "left"},
    "severity": {"mild": "severe", "moderate": "severe", "severe": "mild", "small": "large", "large": "small"},
    "location": {
        "upper": "lower",
        "lower": "upper",
        "apical": "basal",
        "basal": "apical",
        "apex": "base",
        "base": "apex",
    },
    "trend": {"increased": "decreased", "decreased": "increased", "improved": "worsened", "worsened": "improved"},
    "finding": {
        "pneumothorax": "pleural effusion",
        "pleural effusion": "pneumothorax",
        "consolidation": "edema",
        "edema": "consolidation",
        "pneumonia": "atelectasis",
        "atelectasis": "pneumonia",
    },
}
NEGATION = r"\b(no|without|free of|negative for|absence of|resolved)\b"
UNCERTAINTY = r"\b(may|possible|possibly|probable|probably|could|suggest\w*|suspicious)\b"
BREAK = r"\b(but|however|although)\b|;"
DONOR_EXCLUSION = (
    r"\b(compar\w*|prior|previous|unchanged|interval|stable|tube|catheter|pacemaker|line|increas\w*|decreas\w*|"
    r"improv\w*|worsen\w*)\b|___|\d|:"
)
ABBREVIATIONS = ("approx", "dr", "e.g", "i.e", "mr", "mrs", "ms", "vs")


@dataclass(frozen=True)
class Tables:
    """The tables; the defaults are the published recommendation.

    Args:
        lexicon: Label -> the words that name it.
        substitutions: Subtype -> word -> what it is exchanged for. `finding` exchanges names of findings, `laterality`
            spares sentences that say bilateral.
        negation, uncertainty: Patterns of words before a finding, in lower case.
        break_: Pattern behind whose last match a new statement begins (`break` in files).
        donor_exclusion: Pattern of sentences that are not put into another report.
        abbreviations: What a full stop may follow without ending a sentence, in lower case.

    Raises:
        UserError: If a table has another form, or a pattern cannot be read.
    """

    lexicon: Mapping[str, Sequence[str]] = field(default_factory=lambda: LEXICON)
    substitutions: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: SUBSTITUTIONS)
    negation: str = NEGATION
    uncertainty: str = UNCERTAINTY
    break_: str = BREAK
    donor_exclusion: str = DONOR_EXCLUSION
    abbreviations: Sequence[str] = ABBREVIATIONS

    def __post_init__(self) -> None:
        """Check the forms."""
        _check(self.lexicon, "lexicon", list)
        _check(self.substitutions, "substitutions", dict)
        if isinstance(self.abbreviations, str) or not all(isinstance(word, str) for word in self.abbreviations):
            raise UserError("abbreviations: must be a list of words")
        for name in ("negation", "uncertainty", "break_", "donor_exclusion"):
            _ = getattr(self, f"{name.rstrip('_')}_pattern")

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str = "tables") -> Tables:
        """Tables by their names in files; what is not named is as recommended.

        Raises:
            UserError: If a name is unknown.
        """
        names = {item.name.rstrip("_"): item.name for item in fields(cls)}
        if unknown := [name for name in raw if name not in names]:
            raise UserError(f"{where}: {quoted(unknown[0])} is no table; known: {', '.join(names)}")
        try:
            return cls(**{names[name]: value for name, value in raw.items()})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def read(cls, path: str | Path) -> Tables:
        """Tables of a JSON file."""
        return cls.of(read_json(path, kind=dict), str(path))

    @functools.cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of the tables' content."""
        content = {item.name.rstrip("_"): asdict(self)[item.name] for item in fields(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """Name of a finding, in lower case -> label."""
        return {name.lower(): label for label, names in self.lexicon.items() for name in names}

    @functools.cached_property
    def names(self) -> tuple[re.Pattern[str] | None, tuple[str, ...]]:
        """Pattern of all names, one group each, and the labels of the groups; longer names come first."""
        order = sorted(((name, label) for label, names in self.lexicon.items() for name in names), key=_longest_first)
        if not order:
            return None, ()
        alternatives = "|".join(f"({re.escape(name)})" for name, _ in order)
        return re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE), tuple(label for _, label in order)

    @functools.cached_property
    def words(self) -> dict[str, tuple[re.Pattern[str], dict[str, str]]]:
        """Subtype -> pattern and replacements of the words that can be exchanged wherever they stand."""
        found = {}
        for subtype, table in self.substitutions.items():
            if subtype != "finding" and table:
                alternatives = "|".join(map(re.escape, sorted(table, key=lambda word: (-len(word), word))))
                lower = {word.lower(): other for word, other in table.items()}
                found[subtype] = re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE), lower
        return found

    @functools.cached_property
    def negation_pattern(self) -> re.Pattern[str]:
        """Of lower-case text."""
        return _compiled(self.negation, "negation")

    @functools.cached_property
    def uncertainty_pattern(self) -> re.Pattern[str]:
        """Of lower-case text."""
        return _compiled(self.uncertainty, "uncertainty")

    @functools.cached_property
    def break_pattern(self) -> re.Pattern[str]:
        """Of lower-case text."""
        return _compiled(self.break_, "break")

    @functools.cached_property
    def donor_exclusion_pattern(self) -> re.Pattern[str]:
        """Of any text."""
        return _compiled(self.donor_exclusion, "donor_exclusion", re.IGNORECASE)


def _longest_first(entry: tuple[str, str]) -> int:
    return -len(entry[0])


def _compiled(pattern: Any, name: str, flags: int = 0) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{name}: is no regular expression ({error})") from None


def _check(table: Any, name: str, kind: type) -> None:
    """Refuse a table that is not label -> words, or subtype -> word -> word."""
    form = {list: "label: [names]", dict: "subtype: {word: replacement}"}[kind]
    right = isinstance(table, Mapping) and all(
        isinstance(inner, Mapping) if kind is dict else isinstance(inner, Sequence) and not isinstance(inner, str)
        for inner in table.values()
    )
    texts = [text for inner in table.values() for text in inner] if right else []
    texts += [text for inner in table.values() for text in inner.values()] if right and kind is dict else []
    if not right or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{name}: must be {{{form}}}, of texts that are not empty")
