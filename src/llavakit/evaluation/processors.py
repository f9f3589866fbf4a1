"""Answer processors: what a benchmark does to a model's text before it compares it.

Published figures depend on the quirks of these rules (a mistyped look-behind, a limit of 32 replacements, "not" that
means no), so the quirks are kept and named. Sources are the evaluation sections of the specs of LLaVA-1.5, LLaVA-Med
and LLaVA-Mini. Nothing here reads files or knows of gold answers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from importlib.resources import files

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The published expression means "not after a digit" but looks behind for the literal "<=" and a digit, so every full
# stop that no digit follows goes; re.UNICODE (32) was passed where the count belongs, so 32 go at most.
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_REMOVED = 32


@functools.cache
def contractions() -> dict[str, str]:
    """Spellings without apostrophe -> the contraction, as the VQA evaluation fixes them."""
    return json.loads(files(__package__).joinpath("contractions.json").read_text(encoding="utf-8"))


def strip_punctuation(text: str) -> str:
    """Delete or blank the 21 marks of the VQA evaluation, then remove full stops.

    A mark is deleted if it stands next to a space anywhere in the text, and all are if the text has a thousands
    comma; otherwise a space takes its place.
    """
    result = text
    thousands = _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or thousands else " ")
    return _FULL_STOP.sub("", result, count=_FULL_STOPS_REMOVED)


def map_words(text: str) -> str:
    """Lower case; number words to digits; articles dropped; contractions restored; single spaces."""
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(contractions().get(word, word) for word in words if word not in ARTICLES)


def vqa_answer(text: str) -> str:
    """The answer processor of the EvalAI server, as TextVQA, VQAv2 and VizWiz submissions of LLaVA-1.5 use it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return map_words(strip_punctuation(text))


def vqa_official_answer(text: str) -> str:
    """The processor of the official VQA evaluation: as `vqa_answer`, without splitting off "'s"."""
    return map_words(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def medical_answer(text: str) -> str:
    """Normalisation of medical VQA (LLaVA-Med, Uni-Med): the VQA rules on the raw text, then no commas at all."""
    return map_words(strip_punctuation(text)).replace(",", "")


def gqa_answer(text: str) -> str:
    """GQA: trailing full stops stripped, lower case."""
    return text.rstrip(".").lower()


def plain_answer(text: str) -> str:
    """Lower case, single spaces, no full stop at the end: the rule of `exact_match`."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def pope_answer(text: str) -> str:
    """POPE: "no" if No, not or no is a word of the text before the first full stop, else "yes".

    Words are what single spaces separate after commas are deleted, so "NO" and "nope" are "yes".
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_answer(text: str) -> str:
    """MME: "yes" or "no" if that is in the first four letters of the lower-cased text, else "other"."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def scienceqa_letter(text: str, options: Sequence[str] = tuple(LETTERS[:5])) -> str | None:
    """ScienceQA: the whole text is an option letter; else it begins "X. "; else it says `The answer is X.` once.

    Returns:
        The letter, not necessarily of an existing option; None if there is none.
    """
    options = tuple(options)  # `in` on a string would find substrings
    if text in options:
        return text
    if text[:1] in options and text[1:3] == ". ":
        return text[0]
    stated = re.findall(r"The answer is ([A-Z]).", text)  # the last dot matches any character
    return stated[0] if len(stated) == 1 else None


def option_letter(text: str, options: Sequence[str] = LETTERS[:4]) -> str | None:
    """A letter that a person would read as the choice: "B", "B.", "(B)", "B: dog", "The answer is B".

    Not a published rule; for benchmarks whose own extraction asks a language model (MMBench).
    """
    text = text.strip()
    letters = "".join(options)
    for pattern in (
        rf"^\(?([{letters}])(?:[).:,]|\s|$)",
        rf"(?i:answer|option|choice)\s*(?:(?i:is|:))?\s*:?\s*\(?([{letters}])(?![A-Za-z])",
        rf"\(([{letters}])\)",
    ):
        found = re.search(pattern, text)
        if found:
            return found.group(1)
    return None


def first_letter(text: str, options: Sequence[str], default: str | None = None) -> str | None:
    """The first character of the text that is an option letter, wherever it stands (EgoSchema; MVBench's `acc`)."""
    return next((character for character in text if character in options), default)


def bracket_letter(text: str) -> str:
    """MVBench and MLVU: the character before the first ")", or the whole text if there is none."""
    end = text.find(")")
    return text if end < 0 else text[max(end - 1, 0) : end]


def bracket_question(question: str, candidates: Sequence[str], answer: str) -> tuple[str, str]:
    """MVBench and MLVU: the question with its options as lines "(A) text", and the answer as "(B) text"."""
    lines = [f"Question: {question}", "Options:"]
    lines += [f"({letter}) {candidate}" for letter, candidate in zip(LETTERS, candidates, strict=False)]
    # The published template takes the last of equal candidates, and "(@)" if none equals the answer.
    places = [place for place, candidate in enumerate(candidates) if candidate == answer]
    return "\n".join(lines).rstrip(), f"({chr(ord('A') + (places[-1] if places else -1))}) {answer}"


def stored_question(prompt: str) -> str | None:
    """The lower-cased question inside a stored TextVQA prompt, by which its annotation is looked up.

    Returns:
        None if the prompt has none of the published forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found.group(1).lower() if found else None
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def percent_box(text: str, size: tuple[float, float], resolution: int = 100) -> tuple[float, ...] | None:
    """A referring answer `{<x1><y1><x2><y2>}` in units of 1/resolution of width and height, in pixels.

    Spaces and `<unk>` are ignored; only the start of the answer counts (MedM-VL and MiniGPT format).

    Args:
        size: Width and height in pixels.

    Returns:
        (x1, y1, x2, y2), or None if the answer has another form.
    """
    text = text.replace("<unk>", "").replace(" ", "").strip()
    found = re.match(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}", text)
    if found is None:
        return None
    return tuple(int(value) / resolution * size[place % 2] for place, value in enumerate(found.groups()))
