"""The chat template of the released models: Llama-3's turns with LLaVA-1.5's system text."""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.builtin import LLAMA_3
from llavakit.conversation.template import get_template

# The text begins with a begin token and the tokenizer adds another: the models were trained with both. An empty turn is
# its header alone, also the user's.
INF_LLAMA_3 = replace(
    LLAMA_3,
    name="inf_llama_3",
    system=get_template("v1").system,
    values={"trims": False, "opens_empty": True},
    bos="double",
)
