"""LLaVA-Mini's template for Llama 3.1.

Its prompts begin with two begin tokens, that of the template and that of the tokenizer; its training text has the
tokenizer's alone, and always ends with an open assistant header.
"""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.builtin import LLAMA_3, SEES

LLAVA_LLAMA_3_1 = replace(
    LLAMA_3,
    name="llava_llama_3_1",
    system=SEES,
    bos="double",
    training="llavakit.systems.llava_mini:llama_3_training",
)
