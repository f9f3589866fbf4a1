"""ReflectiVA's chat template: Llama 3.1's first one.

In a prompt two newlines stand between picture and question, in training one. What is trained on always ends with an
open header of the assistant.
"""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.builtin import SEES
from llavakit.conversation.template import Template

REFLECTIVA = Template(
    "reflectiva",
    "llavakit.systems.reflectiva:prompt",
    SEES,
    stop=("<|eot_id|>",),
    values={"trims": True, "ends_open": True},
    bos="once",
    labels="reflective",
    training="llavakit.systems.reflectiva:training",
)


def closed() -> Template:
    """The template with training text that does not end with an open header, as later ones of Llama 3.1."""
    return replace(REFLECTIVA, name="reflectiva_closed", values={"trims": True, "ends_open": False})
