"""The 14 conditions of chest radiographs by rules: CheXbert's classes without its weights.

A stand-in for where no weights are at hand, under names of its own (`rules_*`): its figures are not CheXbert's. What a
report mentions is decided by `mentions`; of several mentions of a condition a finding outweighs an open one, and that a
denial. "No Finding" is positive where no other condition but support devices is found or open, as the CheXpert labeller
defines it, and blank elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from llavakit.evaluation.metrics.mentions import mentions
from llavakit.evaluation.metrics.reports import BLANK, CONDITIONS, NEGATIVE, POSITIVE, UNCERTAIN

_IS = r"(?:is|are|was|were|remains?|appears?|has been)"
_HEART = r"(?:heart|cardiac silhouette|cardiomediastinal silhouette|heart size|cardiac size|cardiac shadow)"

LEXICON: dict[str, str] = {
    "Enlarged Cardiomediastinum": (
        r"(?:mediastin(?:um|al)(?: contours?| silhouette)?) (?:is |are |appears? )?(?:\w+ ){0,2}?"
        r"(?:wide(?:ned|ning)|enlarged)"
        r"|(?:widen(?:ed|ing)|enlarg(?:ed|ement)|wide)(?: of the)?(?: superior| upper)? (?:cardio)?mediastin(?:um|al)"
    ),
    "Cardiomegaly": (
        rf"cardiomegaly|(?:enlarged|enlargement of(?: the)?) {_HEART}"
        rf"|{_HEART} {_IS} (?:not )?(?:\w+ ){{0,2}}?enlarged|cardiac enlargement"
    ),
    "Lung Opacity": (
        r"opacit(?:y|ies)|opacifications?|airspace disease|infiltrates?|infiltration|haz(?:e|iness)|"
        r"interstitial markings"
    ),
    "Lung Lesion": (
        r"nodules?|mass(?:es)?|lesions?|tumou?rs?|cavitat(?:ion|y) lesions?|nodular (?:opacit|densit)(?:y|ies)"
    ),
    "Edema": r"(?:pulmonary |interstitial |alveolar )*o?edema|vascular congestion|volume overload|heart failure",
    "Consolidation": r"consolidations?|consolidative (?:opacity|opacities|process)",
    "Pneumonia": r"pneumonias?|infectious process|infection",
    "Atelectasis": r"atelecta(?:sis|ses|tic(?: changes?)?)|(?:lung|lobar|lobe) collapse|collapsed (?:lung|lobe)",
    "Pneumothorax": r"pneumothora(?:x|ces)|hydropneumothorax",
    "Pleural Effusion": r"(?:pleural |parapneumonic )?effusions?|pleural fluid|hydrothorax",
    "Pleural Other": r"pleural (?:thickening|plaques?|scarring|lesion)|fibrothorax",
    "Fracture": r"fractures?|fractured",
    "Support Devices": (
        r"pacemakers?|pacer|icd|"
        r"(?:endotracheal|nasogastric|orogastric|enteric|tracheostomy|chest|feeding|dobhoff|et|ng) tubes?|"
        r"catheters?|(?:picc|central(?: venous)?|port-a-cath) lines?|port-a-cath|picc|leads?|wires?|stents?|"
        r"(?:valve|shoulder|hip) (?:replacement|prosthes[ie]s)|swan-ganz|drains?|hardware|clips?"
    ),
}
_FINE = r"(?:normal|within normal limits|unremarkable)"
_NORMAL = {
    "Cardiomegaly": (
        rf"{_HEART}(?: and [\w ]+?)? (?:(?:is|are|appears?|remains?) )?(?:\w+ ){{0,2}}?{_FINE}"
        rf"|normal (?:\w+ )?{_HEART}|normal-sized heart"
    ),
    "Enlarged Cardiomediastinum": (
        rf"(?:cardio)?mediastin(?:um|al)(?: \w+){{0,3}}? (?:(?:is|are|appears?|remains?) )?(?:\w+ )?{_FINE}"
        r"|normal (?:cardio)?mediastin(?:um|al)"
    ),
    "Fracture": rf"(?:osseous structures|bones|bony structures) (?:is|are|appears?) (?:\w+ )?(?:intact|{_FINE})",
}
_NORMAL_PATTERNS = {name: re.compile(rf"\b(?:{own})\b", re.IGNORECASE) for name, own in _NORMAL.items()}
_CLASSES = {"denied": NEGATIVE, "open": UNCERTAIN, "found": POSITIVE}
_WEIGHT = {BLANK: 0, NEGATIVE: 1, UNCERTAIN: 2, POSITIVE: 3}


def label(report: str) -> list[int]:
    """Class per condition of one report, in the order of `CONDITIONS`: 0 blank, 1 positive, 2 negative, 3 uncertain."""
    classes = dict.fromkeys(CONDITIONS, BLANK)
    said = [(name, NEGATIVE) for name, own in _NORMAL_PATTERNS.items() if own.search(" ".join(report.split()))]
    said += [(mention.name, _CLASSES[mention.polarity]) for mention in mentions(report, LEXICON)]
    for name, found in said:
        classes[name] = max(classes[name], found, key=_WEIGHT.__getitem__)
    abnormal = [name for name in CONDITIONS if name not in ("No Finding", "Support Devices")]
    if not any(classes[name] in (POSITIVE, UNCERTAIN) for name in abnormal) and report.strip():
        classes["No Finding"] = POSITIVE
    return list(classes.values())


def labels(reports: Sequence[str]) -> np.ndarray:
    """Classes [14, reports]."""
    return np.array([label(report) for report in reports], int).reshape(len(reports), len(CONDITIONS)).T
