"""Answer processors: normalisation of a model's text before a benchmark compares it.

Published figures depend on the quirks of these rules (a mistyped look-behind, a limit of 32 replacements, "not" that
means no), so the quirks are kept and documented. Sources are the evaluation sections of the specs of LLaVA-1.5,
LLaVA-Med and LLaVA-Mini. Nothing here reads files or knows of gold answers.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.resources import files

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The published expression means "not after a digit" but looks behind for the literal "<=" and a digit, so every full
# stop without a digit after it is removed; re.UNICODE (32) was passed as the count, so at most 32 are removed.
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_REMOVED = 32


@functools.cache
def contractions() -> dict[str, str]:
    """Spellings without apostrophe -> the contraction, as the VQA evaluation fixes them."""
    return json.loads(files(__package__).joinpath("contractions.json").read_text(encoding="utf-8"))


def strip_punctuation(text: str) -> str:
    """Delete the 21 marks of the VQA evaluation or replace them by spaces, then remove full stops.

    A mark is deleted if it occurs next to a space anywhere in the text, and all are if the text has a thousands
    comma; otherwise it becomes a space.
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


_MARKUP = re.compile(r"\\boxed\{([^{}]*)\}|[*_`$\"\u201c\u201d]")
_STATED = re.compile(
    r"(?:(?i:\b(?:answer|option|choice)(?:\s+(?:is|would be|should be))?)|答案|选项|选择|选)"
    r"\s*[:：]?\s*(?:是选项|是|为)?\s*(?:(?i:option|choice)\s+)?([(\[]?)([A-Za-z])(?![A-Za-z0-9'])"
)


def option_letter(text: str, letters: Sequence[str] = LETTERS[:4], options: Sequence[str] = ()) -> str | None:
    """The letter that a person would read as the choice.

    "B", "**B**", "(b)", "Ｂ.", "B: dog", "The answer is B" and, if "dog" is an option's text, "dog". An article is no
    letter: "A dog" is option A only if "dog" is that option's text. Not a published rule; for benchmarks whose own
    extraction asks a language model (MMBench).

    Args:
        letters: The printed letters, in order, in upper case.
        options: Texts of the options in the order of the letters, for replies that give a text.
    """
    text = _MARKUP.sub(r"\1", unicodedata.normalize("NFKC", text)).strip()
    texts = dict(zip(letters, map(_plain_words, options), strict=False))
    same = [letter for letter, option in texts.items() if option and option == _plain_words(text)]
    if len(same) == 1 and not (len(text) == 1 and text.upper() in letters):
        return same[0]
    leading = re.match(r"[(\[]?([A-Za-z])(?=[)\].:,、]|\s|$)", text)
    bracketed = leading and text[0] in "(["
    if leading and _is_choice(text, leading.start(1), letters, texts, lower=bool(bracketed)):
        return leading[1].upper()
    for stated in _STATED.finditer(text):
        if _is_choice(text, stated.start(2), letters, texts, lower=bool(stated[1])):
            return stated[2].upper()
    found = {letter.upper() for letter in re.findall(r"[(\[]([A-Za-z])[)\]]", text)} & set(letters)
    if len(found) == 1:
        return found.pop()
    return _mentioned(_plain_words(text), texts)


def _is_choice(text: str, place: int, letters: Sequence[str], texts: Mapping[str, str], *, lower: bool) -> bool:
    """Whether the letter at a place is a choice rather than an article, a pronoun or the beginning of a sentence."""
    letter, rest = text[place], text[place + 1 :]
    if letter.upper() not in letters:
        return False
    closed = not rest.strip() or rest[0] == "\n" or not (rest[0].isspace() or rest[0] in "-'")
    if letter.islower():
        return lower or (closed and place == 0)
    if closed or letter not in ("A", "I"):
        return True
    return texts.get(letter) not in (None, "") and _plain_words(rest).startswith(texts[letter])


def _mentioned(text: str, texts: Mapping[str, str]) -> str | None:
    """The option whose text is the only one in a reply; an option inside a longer one that is there does not count."""
    there = [letter for letter, option in texts.items() if option and f" {option} " in f" {text} "]
    whole = [a for a in there if not any(a != b and f" {texts[a]} " in f" {texts[b]} " for b in there)]
    return whole[0] if len(whole) == 1 else None


def _plain_words(text: str) -> str:
    """Lower-cased words and numbers of a text without articles, single spaces between them."""
    words = re.findall(r"[^\W_]+(?:[.,'][^\W_]+)*", unicodedata.normalize("NFKC", text).lower())
    return " ".join(word for word in words if word not in ARTICLES)


def first_letter(text: str, options: Sequence[str], default: str | None = None) -> str | None:
    """The first character of the text that is an option letter (EgoSchema; MVBench's `acc`)."""
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
