"""An audit of metrics: phantom reports damaged in eight known ways, beside faithful paraphrases of them.

A metric is right about a damaged report if it ranks it below a paraphrase that says the same as the reference in other
words. The eighth way, another order of the sentences, changes nothing that is said: there a metric is right if it does
not rank the report below the paraphrase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llavakit.errors import UserError
from llavakit.evaluation.metrics.phantom_findings import finding_f1
from llavakit.evaluation.reports.files import Reports
from llavakit.evaluation.reports.metrics import Sources, computed
from llavakit.phantom import anatomy, words
from llavakit.phantom.base import generator, pick
from llavakit.phantom.patient import MODALITIES, SETTINGS, SIZES, ZONES, Finding, draw_findings
from llavakit.phantom.report import NAMES, write_report

Sentences = list[str]
FINDINGS = "phantom_findings"
_NODULES = 2  # most of one patient
_TIE = 1e-9  # equal up to rounding


def report(findings: Sequence[Finding]) -> str:
    """The findings section about a patient, as the phantom world writes it."""
    return write_report(list(findings), MODALITIES)["findings"]


# Ways to damage a report


def _exchanged(findings: Sequence[Finding], place: int, **values: Any) -> str:
    changed = list(findings)
    changed[place] = replace(changed[place], **values)
    return report(changed)


def _among(
    rng: np.random.Generator, findings: Sequence[Finding], fits: Callable[[Finding], bool]
) -> tuple[int, Finding] | None:
    places = [n for n, finding in enumerate(findings) if fits(finding)]
    if not places:
        return None
    place = int(pick(rng, places))
    return place, findings[place]


def _other(rng: np.random.Generator, values: Sequence[str], value: str | None) -> str:
    return str(pick(rng, [own for own in values if own != value]))


def negation(rng: np.random.Generator, findings: Sequence[Finding]) -> str | None:
    """A finding is denied where it was found, or found where it was denied."""
    text = report(findings)
    found = [("There is a ", "There is no "), ("There is consolidation", "There is no consolidation")]
    found += [("The heart is enlarged", "The heart is not enlarged")]
    denied = [("There is no ", "There is a "), ("The heart size is normal", "The heart is enlarged")]
    sentences = _sentences(text)
    fitting = [
        (n, old, new)
        for n, sentence in enumerate(sentences)
        for old, new in (*found, *denied)
        if sentence.startswith(old)
    ]
    n, old, new = fitting[int(rng.integers(len(fitting)))]
    sentences[n] = new + sentences[n].removeprefix(old)
    return " ".join(sentences).replace("There is a consolidation", "There is consolidation")


def side(rng: np.random.Generator, findings: Sequence[Finding]) -> str | None:
    """A finding changes sides."""
    chosen = _among(rng, findings, lambda own: own.side is not None)
    return chosen and _exchanged(findings, chosen[0], side=_other(rng, anatomy.SIDES, chosen[1].side))


def size(rng: np.random.Generator, findings: Sequence[Finding]) -> str | None:
    """A nodule is small instead of large, or the reverse."""
    chosen = _among(rng, findings, lambda own: own.kind == "nodule")
    return chosen and _exchanged(findings, chosen[0], size=_other(rng, SIZES, chosen[1].size))


def severity(rng: np.random.Generator, findings: Sequence[Finding]) -> str | None:
    """An effusion or a pneumothorax is small instead of large, or the reverse."""
    chosen = _among(rng, findings, lambda own: own.kind in ("effusion", "pneumothorax"))
    return chosen and _exchanged(findings, chosen[0], size=_other(rng, SIZES, chosen[1].size))


def location(rng: np.random.Generator, findings: Sequence[Finding]) -> str | None:
    """A finding moves to another zone."""
    chosen = _among(rng, findings, lambda own: own.zone is not None)
    return chosen and _exchanged(findings, chosen[0], zone=_other(rng, ZONES, chosen[1].zone))


def omission(rng: np.random.Generator, findings: Sequence[Finding]) -> str | None:
    """Nothing is said of a kind of finding that is there."""
    chosen = _among(rng, findings, lambda own: True)
    if chosen is None:
        return None
    kinds = tuple(kind for kind in MODALITIES if kind != chosen[1].kind)
    return write_report(list(findings), kinds)["findings"]


def invention(rng: np.random.Generator, findings: Sequence[Finding]) -> str | None:
    """A finding is added of a kind that is not there."""
    absent = [kind for kind in MODALITIES if all(own.kind != kind for own in findings)]
    if not absent:
        return None
    kind = str(pick(rng, absent))
    values = {"side": str(pick(rng, anatomy.SIDES)), "zone": str(pick(rng, ZONES)), "size": str(pick(rng, SIZES))}
    kept = {"cardiomegaly": (), "nodule": tuple(values), "consolidation": ("side", "zone")}.get(kind, ("side", "size"))
    return report([*findings, Finding(kind, **{name: values[name] for name in kept})])


def order(rng: np.random.Generator, findings: Sequence[Finding]) -> str | None:
    """The same sentences in another order."""
    sentences = _sentences(report(findings))
    shuffled = [sentences[n] for n in rng.permutation(len(sentences))]
    return " ".join(sentences[::-1] if shuffled == sentences else shuffled)


DAMAGES: dict[str, Callable[[np.random.Generator, Sequence[Finding]], str | None]] = {
    "negation": negation,
    "side": side,
    "size": size,
    "omission": omission,
    "invention": invention,
    "location": location,
    "severity": severity,
    "order": order,
}


def _sentences(text: str) -> Sentences:
    return [f"{sentence.rstrip('.')}." for sentence in text.split(". ")]


# Paraphrases


def paraphrase(rng: np.random.Generator, findings: Sequence[Finding]) -> str:
    """The same findings, one to all kinds of them in other words; in half of the reports kinds change places too."""
    kinds = list(map(str, rng.permutation(MODALITIES) if rng.random() < 0.5 else MODALITIES))
    changed = {str(kind) for kind in rng.permutation(MODALITIES)[: 1 + int(rng.integers(len(MODALITIES)))]}
    lines = []
    for kind in kinds:
        found = [finding for finding in findings if finding.kind == kind]
        name = NAMES[kind]
        if kind not in changed:
            lines.append(write_report(found, (kind,))["findings"])
        elif found:
            lines += [_in_other_words(rng, finding) for finding in found]
        else:
            forms = [f"No evidence of {name}.", f"{words.capital(name)} is not seen.", f"Negative for {name}."]
            forms += ["The cardiac silhouette is not enlarged."] if kind == "cardiomegaly" else []
            lines.append(str(pick(rng, forms)))
    return " ".join(lines)


def _in_other_words(rng: np.random.Generator, finding: Finding) -> str:
    name = NAMES[finding.kind]
    size = {"small": ("small", "mild"), "large": ("large", "severe")}
    if finding.kind == "cardiomegaly":
        forms = ["Cardiomegaly is present.", "Enlarged heart.", "The cardiac silhouette is enlarged."]
    elif finding.kind == "consolidation":
        forms = [
            f"The {finding.place} shows consolidation.",
            f"Consolidation is seen in the {finding.zone} zone on the {finding.side}.",
        ]
    elif finding.kind == "nodule":
        forms = [
            f"In the {finding.place} lies a {finding.size} nodule.",
            f"A {finding.size} nodule is seen in the {finding.zone} zone on the {finding.side}.",
        ]
    else:
        extent = str(pick(rng, size[str(finding.size)]))
        forms = [
            f"{words.capital(extent)} {name} on the {finding.side}.",
            f"On the {finding.side} side a {extent} {name} is visible.",
        ]
    return str(pick(rng, forms))


# The audit


def audit(count: int = 300, *, seed: int = 0, sources: Sources | None = None) -> dict[str, Any]:
    """How often every metric is right about damaged phantom reports.

    Args:
        count: Patients with at least one finding.
        sources: Weights and programs, see `reports.metrics`.

    Returns:
        reports; applicable {damage: reports that it applies to}; right {metric: {damage or "all": percent}}, sorted by
        "all"; examples {damage: {reference, paraphrase, damaged}}; not_computed {metric: reason}.

    Raises:
        UserError: If there is not at least one report.
    """
    if count < 1:
        raise UserError(f"reports={count}: must be at least 1")
    sources = sources or Sources()
    rng = generator(seed, 0, "audit of metrics")
    references, faithful = [], []
    damaged: dict[str, list[str | None]] = {name: [] for name in DAMAGES}
    while len(references) < count:
        findings = draw_findings(rng, MODALITIES, _NODULES, SETTINGS["full"])
        if not findings:
            continue
        references.append(report(findings))
        faithful.append(paraphrase(rng, findings))
        for name, damage in DAMAGES.items():
            damaged[name].append(damage(rng, findings))
    wanted = _reports(references)
    try:
        baseline, missing = computed(_reports(faithful), wanted, sources)
        names = [name for name in baseline if np.isfinite(baseline[name].each).any()]
        right: dict[str, dict[str, float]] = {name: {} for name in [FINDINGS, *names]}
        tried: dict[str, int] = {}
        for damage, texts in damaged.items():
            rows = np.array([n for n, text in enumerate(texts) if text is not None], int)
            tried[damage] = len(rows)
            # Reports that a damage does not fit stay in, so that document frequencies are the same.
            full = [reference if text is None else text for text, reference in zip(texts, references, strict=True)]
            values = computed(_reports(full), wanted, sources)[0]
            scores = {name: (baseline[name].each, own.each) for name, own in values.items()}
            scores[FINDINGS] = (_findings(faithful, references), _findings(full, references))
            for name in right:
                kept, other = (np.nan_to_num(values[rows]) for values in scores[name])
                gap = kept - other
                holds = gap <= _TIE if damage == "order" else gap > _TIE
                right[name][damage] = float(holds.mean()) * 100 if len(rows) else np.nan
    finally:
        sources.close()
    for row in right.values():
        shares = [(row[damage], tried[damage]) for damage in DAMAGES if tried[damage]]
        row["all"] = sum(share * n for share, n in shares) / sum(n for _, n in shares)
    found = sorted(right, key=lambda name: -right[name]["all"])
    return {
        "reports": count,
        "seed": seed,
        "applicable": tried,
        "right": {name: {key: _known(value) for key, value in right[name].items()} for name in found},
        "examples": {
            damage: _example(texts, references, faithful) for damage, texts in damaged.items() if tried[damage]
        },
        "not_computed": missing,
    }


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _reports(texts: Sequence[str]) -> Reports:
    none = [None] * len(texts)
    return Reports("phantom reports", [str(n) for n in range(len(texts))], texts, none, none)


def _findings(texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    return np.array([finding_f1(text, reference) for text, reference in zip(texts, references, strict=True)])


def _example(texts: Sequence[str | None], references: Sequence[str], faithful: Sequence[str]) -> dict[str, str]:
    n = next(n for n, text in enumerate(texts) if text is not None)
    return {"reference": references[n], "paraphrase": faithful[n], "damaged": str(texts[n])}
