"""Text about a patient: report, statements of a knowledge graph, questions with their answers."""

from __future__ import annotations

import numpy as np

from llavakit.phantom import anatomy, words
from llavakit.phantom.base import Question, thin
from llavakit.phantom.patient import CHANGES, DEPTHS, SIZES, ZONES, Finding, Setting

NAMES = {
    "cardiomegaly": "cardiomegaly",
    "nodule": "nodule",
    "consolidation": "consolidation",
    "effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
}

IMAGE_TYPES = ("presence", "side", "zone", "size", "count")
EASY_TYPES = ("presence", "side", "zone", "size")
VOLUME_TYPES = ("presence", "side", "zone", "depth")
TYPES = (*IMAGE_TYPES, "depth", "change")

KNOWLEDGE = (
    ("enlarged heart", "suggestive_of", "cardiomegaly"),
    ("cardiomegaly", "suggestive_of", "heart failure"),
    ("pleural effusion", "suggestive_of", "heart failure"),
    ("consolidation", "suggestive_of", "pneumonia"),
    ("pneumothorax", "suggestive_of", "collapsed lung"),
    ("nodule", "suggestive_of", "granuloma"),
)

_CHANGE_PHRASES = {
    "grown": "has grown",
    "shrunk": "has shrunk",
    "gone": "has gone",
    "unchanged": "is unchanged",
}


def describe(finding: Finding, findings: list[Finding]) -> str:
    """The name of a finding, with its place where there are several of its kind."""
    name = NAMES[finding.kind]
    several = sum(f.kind == finding.kind for f in findings) > 1
    return f"{finding.side} {finding.zone} {name}" if several and finding.zone else name


def write_report(findings: list[Finding], kinds: tuple[str, ...]) -> dict[str, str]:
    """ "findings" (what is and what is not there, by organ) and "impression" (what matters)."""
    lines, impression = [], []
    for kind in kinds:
        found = [f for f in findings if f.kind == kind]
        if kind == "cardiomegaly":
            lines.append("The heart is enlarged." if found else "The heart size is normal.")
        elif not found:
            lines.append(f"There is no {NAMES[kind]}.")
        elif len(found) > 1:
            lines.append(f"There are {words.NUMBERS[len(found)].lower()} nodules.")
            lines += [f"There is {words.article(f.size)} nodule in the {f.place}." for f in found]
        elif kind == "nodule":
            lines.append(f"There is {words.article(found[0].size)} nodule in the {found[0].place}.")
        elif kind == "consolidation":
            lines.append(f"There is consolidation in the {found[0].place}.")
        else:
            lines.append(f"There is {words.article(found[0].size)} {found[0].side} {NAMES[kind]}.")
        if len(found) > 1:
            impression.append("nodules")
        elif found:
            f = found[0]
            impression.append(f"{f.place} {NAMES[kind]}" if f.side else NAMES[kind])
    text = words.capital(words.listing(impression)) + "." if impression else "No acute findings."
    return {"findings": " ".join(lines), "impression": text}


def statements(findings: list[Finding]) -> list[tuple[str, str, str]]:
    """What holds for this patient, in the relations of RadGraph (modify, located_at, suggestive_of)."""
    suggests = {subject: t for t in KNOWLEDGE for subject in [t[0]]}
    out = []
    for finding in findings:
        name = NAMES[finding.kind]
        if finding.size:
            out.append((finding.size, "modify", name))
        if finding.side:
            out.append((name, "located_at", f"{finding.place}" if finding.zone else f"{finding.side} lung"))
        out.append(suggests[name])
    return list(dict.fromkeys(out))


def ask(
    rng: np.random.Generator,
    findings: list[Finding],
    types: tuple[str, ...],
    kinds: tuple[str, ...],
    setting: Setting,
    *,
    picture: str = "radiograph",
) -> list[Question]:
    """Questions about one patient in random order, except that none gives away the answer of a later one.

    Presence and number are asked before what presupposes them and, in half of the dialogues each, not at all, so that
    a dialogue can open with any type of question.

    Args:
        types: Which types to ask, of `TYPES`.
        kinds: Findings that occur in this world.
        setting: How frequent each kind is.
        picture: "radiograph" or "scan".
    """
    about: list[tuple[str, Question]] = []
    for kind in kinds:
        found = [f for f in findings if f.kind == kind]
        details = [(kind, question) for question in _details(rng, kind, found, types)]
        # Whether a kind has details depends on the types alone, so yes and no stay equally likely.
        share = 0.5 if kind != "cardiomegaly" and set(types) - {"presence"} else 1.0
        if "presence" in types and rng.random() < share and thin(rng, bool(found), setting.prevalence[kind]):
            about.append((kind, presence_question(kind, bool(found), picture)))
        about += details
    about = [about[i] for i in rng.permutation(len(about))]
    if setting.one_sided:
        sides = [entry for entry in about if entry[1].type == "side"]
        about = [entry for entry in about if entry not in sides[1:]]
    # A question about the nodule gives away that there is one, and that there are no more.
    for type_ in ("count", "presence"):
        for place, (kind, question) in enumerate(about):
            if question.type == type_:
                first = next(i for i, (other, _) in enumerate(about) if other == kind)
                about.insert(first, about.pop(place))
    return [question for _, question in about]


def _details(rng: np.random.Generator, kind: str, found: list[Finding], types: tuple[str, ...]) -> list[Question]:
    """Questions that presuppose that there is a finding of this kind."""
    questions = []
    if kind == "nodule" and found and "count" in types and rng.random() < 0.5:
        questions.append(count_question(len(found)))
    if len(found) == 1:
        values = {"side": found[0].side, "zone": found[0].zone, "size": found[0].size, "depth": found[0].depth}
        questions += [detail_question(t, kind, v) for t, v in values.items() if t in types and v]
    return questions


def count_question(number: int) -> Question:
    """How many nodules there are."""
    word = words.NUMBERS[number]
    sentence = "There is one nodule." if number == 1 else f"There are {word.lower()} nodules."
    return Question("count", "How many nodules are there?", word, sentence, ("One", "Two", "Three"))


_DETAILS = {
    "side": (anatomy.SIDES, "On which side is the {name}?", "The {name} is on the {value} side."),
    "zone": (ZONES, "In which zone is the {name}?", "The {name} is in the {value} zone."),
    "size": (SIZES, "Is the {name} small or large?", "The {name} is {value}."),
    "depth": (
        DEPTHS,
        "Is the {name} in the anterior or the posterior half of the lung?",
        "The {name} is in the {value} half of the lung.",
    ),
}


def detail_question(type_: str, kind: str, value: str) -> Question:
    """Side, zone, size or depth of the only finding of a kind."""
    options, text, sentence = _DETAILS[type_]
    name = NAMES[kind]
    return Question(
        type_,
        text.format(name=name),
        words.capital(value),
        sentence.format(name=name, value=value),
        tuple(map(words.capital, options)),
    )


def change_question(name: str, change: str) -> Question:
    """What became of a finding between two studies."""
    return Question(
        "change",
        f"How has the {name} changed since the first radiograph?",
        words.capital(change),
        f"The {name} {_CHANGE_PHRASES[change]}.",
        tuple(map(words.capital, CHANGES)),
    )


def presence_question(kind: str, present: bool, picture: str) -> Question:
    """Whether there is a finding of a kind."""
    answer = "Yes" if present else "No"
    if kind == "cardiomegaly":
        sentence = "The heart is enlarged." if present else "The heart is not enlarged."
        return Question("presence", "Is the heart enlarged?", answer, sentence, ("Yes", "No"))
    name = NAMES[kind]
    noun = name if kind == "consolidation" else words.article(name)
    there = f"there is {noun}." if present else f"there is no {name}."
    return Question("presence", f"Is there {noun} in this {picture}?", answer, words.capital(there), ("Yes", "No"))
