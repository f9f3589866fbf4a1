"""Sentences that all phantom worlds share: response formats, caption requests, the system sentence of template `v1`.

The wording of the requests is LLaVA-1.5's (spec llava-1.5, section 4.5), so that a model trained on a phantom world
answers the same prompts as a published one.
"""

from __future__ import annotations

SHORT = "Answer the question using a single word or phrase."
CHOICE = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
REGION = "Provide a short description for this region."
GROUND = "Provide the bounding box coordinate of the region this sentence describes."

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
LETTERS = "ABCDEFGH"


def shared_texts() -> list[str]:
    """Texts common to all worlds: format sentences, template words, numbers."""
    coordinates = " ".join(f"[0.{i}{i}, 0.{i}{(i + 3) % 10}, 1.00, 0.{(i + 7) % 10}{i}]" for i in range(10))
    return [
        f"{SYSTEM} USER: \n{SHORT} ASSISTANT: Yes",
        f"{SYSTEM} USER:  ASSISTANT: No",
        f"{SYSTEM} USER: \n{CHOICE} ASSISTANT: A",
        f"USER: {CAPTION} ASSISTANT: Yes. No.",
        f"USER: {REGION} {GROUND} ASSISTANT: {coordinates}",
        " ".join(NUMBERS),
        " ".join(word.lower() for word in NUMBERS),
        "\n".join(f"{letter}. {letter}" for letter in LETTERS),
        "0 1 2 3 4 5 6 7 8 9",
    ]


def article(noun: str) -> str:
    """The noun phrase with "a" or "an" in front."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def listing(parts: list[str]) -> str:
    """Parts joined as in "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
