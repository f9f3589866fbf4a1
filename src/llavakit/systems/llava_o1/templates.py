"""LLaVA-o1's chat template: Llama-3's without a system text, empty turns written as they are."""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.builtin import LLAMA_3

LLAVA_O1 = replace(LLAMA_3, name="llava_o1", values={**LLAMA_3.values, "keeps_empty": True})
