"""The chat templates of both generations, in the four styles in which their code writes a conversation.

v1.0 knows `simple` (its evaluation) and variations of it, and Vicuna's form. v1.5's released model speaks Mistral's
`mistral_instruct`, which the core has; in the other templates of its code every message is stripped, the closing
separator has a space behind it, and the whole prompt is stripped. Source: `llava/conversation.py` of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llavakit.conversation.builtin import CURIOUS_HUMAN, CURIOUS_USER, IMAGE_TAGS, LLAVA_V0, MMTAG, VICUNA_V1
from llavakit.conversation.template import Template
from llavakit.errors import UserError, quoted

TURNS, BRACKETS, SIGNALS = (f"{__package__}:{name}" for name in ("turns", "brackets", "signals"))
HUMAN, USER = ("Human", "Assistant"), ("USER", "ASSISTANT")
EXAMPLE = ("Hi!", "Hi there!  How can I help you today?\n")
LEGACY_EXAMPLE = ("Hi!\n\n### Response:", EXAMPLE[1])

# The original joins these sentences without a space.
_LLAVA_MED = (
    "You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at Microsoft, based on "
    "the general domain LLaVA architecture."
)
_SEES = (
    "You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "medical and clinical "
)
_EXPLAIN = "Follow the instructions carefully and explain your answers in detail."
LEGACY = (
    f"{_LLAVA_MED}You are designed to assist human with a variety of medical and clinical research tasks using natural "
    "language.Follow the instructions carefully."
)
MULTIMODAL = f"{_LLAVA_MED}{_SEES}tasks using natural language.{_EXPLAIN}"
RESEARCH = f"{_LLAVA_MED}{_SEES}research tasks using natural language.{_EXPLAIN}"


def hashes(name: str, system: str, example: Sequence[str] = (), roles: Sequence[str] = HUMAN, sep: str = "###") -> Any:
    """Style SINGLE: one separator behind the system text and every turn.

    Args:
        example: Turns that stand before every conversation, the human's first.
        roles: What the two speakers are called.
        sep: The separator.
    """
    return replace(
        LLAVA_V0,
        name=name,
        file=TURNS,
        system=system,
        stop=(sep,),
        values={
            "preset": [[number % 2, text] for number, text in enumerate(example)],
            "heads": [f"{role}:" for role in roles],
            "space": " ",
            "opening": sep,
            "ends": [sep, sep],
            "strips": False,
            "opens": True,
        },
        training=SIGNALS,
    )


def two_separators(
    name: str,
    system: str,
    roles: Sequence[str] = USER,
    separators: Sequence[str] = (" ", "</s>"),
    *,
    strips: bool = False,
    **values: Any,
) -> Template:
    """Style TWO: a separator behind the human's turns, another behind the assistant's.

    Args:
        strips: Whether messages and the whole prompt are stripped and a space follows the second separator (v1.5).
        values: Further values of the template's file.
    """
    first, second = separators
    return replace(
        VICUNA_V1,
        name=name,
        file=TURNS,
        system=system,
        stop=(second,),
        values={
            "preset": [],
            "heads": [f"{role}:" for role in roles],
            "space": " ",
            "opening": first,
            "ends": [first, f"{second} " if strips else second],
            "strips": strips,
            "opens": True,
            **values,
        },
        rounds=replace(VICUNA_V1.rounds, end=second, answer=f" {roles[1]}: "),
    )


def marked(name: str, system: str, roles: Sequence[str], sep: str) -> Template:
    """Style MPT: the role strings hold their own marks, and a separator ends the system text and every turn."""
    values = {"preset": [], "heads": list(roles), "space": "", "opening": sep, "ends": [sep, sep]}
    return Template(name, TURNS, system, stop=(sep,), values={**values, "strips": False, "opens": True})


def bracketed(name: str, system: str, begin: str, *, tagged: bool = True) -> Template:
    """Styles LLAMA_2 and MISTRAL: `[INST] question [/INST] answer </s>`.

    Args:
        begin: Written before every question but the first.
        tagged: Whether the system text stands between tags and answers between spaces (LLAMA_2); in style MISTRAL,
            which no released template has, a space follows it.
    """
    tags = {"system_head": "<<SYS>>\n", "system_tail": "\n<</SYS>>\n\n", "space": " ", "always_system": False}
    plain = {"system_head": "", "system_tail": " ", "space": "", "always_system": True}
    return Template(name, BRACKETS, system, stop=("</s>",), values={"begin": begin, **(tags if tagged else plain)})


def conversation_template(name: str, facts: Mapping[str, Any]) -> Template:
    """A template from what the original's `Conversation` holds.

    Args:
        facts: `system`, `roles`, `sep_style` (SINGLE, TWO, LLAMA_2, MPT), `sep`, `sep2`; `preset_messages` as pairs of
            role and text (v1.0); what else a `Conversation` has (`version`, `offset`) does not change its text.

    Raises:
        UserError: If the style is another, or a preset message's speaker is not one of the roles.
    """
    style, system, roles, sep = (facts[key] for key in ("sep_style", "system", "roles", "sep"))
    preset, strips = facts.get("preset_messages") or [], "preset_messages" not in facts
    for number, (speaker, _) in enumerate(preset):
        if speaker != roles[number % 2]:
            raise UserError(
                f"preset_messages.{number}: the speaker is {quoted(speaker)}, not {quoted(roles[number % 2])}"
            )
    if style == "SINGLE":
        return hashes(name, system, [text for _, text in preset], roles, sep)
    if preset:
        raise UserError(f"sep_style: {quoted(style)} has no preset messages")
    if style == "TWO":
        return two_separators(name, system, roles, (sep, facts["sep2"]), strips=strips)
    if style == "LLAMA_2":
        return bracketed(name, system, sep)
    if style == "MPT":
        return marked(name, system, roles, sep)
    raise UserError(f"sep_style: must be SINGLE, TWO, LLAMA_2 or MPT, not {quoted(style)}")


# v1.0; in prompts the picture follows the question, training samples have it where the record has it

_PLACED = {"placement": "back", "training_placement": "keep"}

SIMPLE = replace(hashes("llava_med_simple", CURIOUS_HUMAN, EXAMPLE), **_PLACED)
# The released models' evaluation ends a prompt behind the separator: the model itself writes "Assistant:".
EVALUATION = replace(SIMPLE, name="llava_med_simple_unopened", values={**SIMPLE.values, "opens": False})
SIMPLE_LEGACY = replace(hashes("llava_med_simple_legacy", LEGACY, LEGACY_EXAMPLE), **_PLACED)
MULTIMODAL_SIMPLE = replace(hashes("llava_med_multimodal", MULTIMODAL, EXAMPLE), **_PLACED)
VICUNA_V1_1 = replace(two_separators("llava_med_vicuna_v1_1", CURIOUS_USER), **_PLACED)
RESEARCH_V1 = replace(two_separators("llava_med_v1", RESEARCH), **_PLACED)
BAIR_V1 = replace(two_separators("llava_med_bair_v1", "BEGINNING OF CONVERSATION:", ("USER", "GPT")), **_PLACED)

# v1.5

STRIPPED_USER = two_separators("llava_med_1_5_vicuna_v1", CURIOUS_USER, strips=True)
STRIPPED_HUMAN = two_separators("llava_med_1_5_llava_v1", CURIOUS_HUMAN, strips=True)
STRIPPED_TAGS = two_separators("llava_med_1_5_v1_mmtag", MMTAG, strips=True, **IMAGE_TAGS)
