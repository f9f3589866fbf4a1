"""The four stages of a reply, in the spellings that users meet.

    <SUMMARY> ... </SUMMARY>  <CAPTION> ... </CAPTION>  <REASONING> ... </REASONING>  <CONCLUSION> ... </CONCLUSION>
    (Here begins the CONCLUSION stage) ... (Here ends the CONCLUSION stage)

The first three are reasoning, the conclusion is the answer. Tags are ordinary text of the model, not special tokens.
"""

from __future__ import annotations

import re

from llavakit.conversation.stages import Stage, Stages

NAMES = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")


def end_of(name: str) -> str:
    """The tag that closes a stage."""
    return f"</{name}>"


def sections(text: str) -> dict[str, str | None]:
    """What stands inside the first closed tag of every stage, as it is; None where there is none."""
    found = {name: re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL) for name in NAMES}
    return {name: None if match is None else match[1] for name, match in found.items()}


def stages_codec() -> Stages:
    """Reads and writes replies in stages."""

    def spelt(name: str) -> Stage:
        opens = (f"<{name}>", f"(Here begins the {name} stage)")
        return Stage(name, opens, (end_of(name), f"(Here ends the {name} stage)"))

    return Stages([spelt(name) for name in NAMES[:-1]], answer=spelt(NAMES[-1]))
