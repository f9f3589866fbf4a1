"""The chat templates of the released models, one per language model (XTuner's, spec section 4.4)."""

from __future__ import annotations

from typing import Any

from llavakit.conversation.builtin import CURIOUS_USER
from llavakit.conversation.template import Template


def _template(name: str, stop: str, **values: Any) -> Template:
    defaults = {"every_turn": False, "separator": "\n", "end": stop}
    return Template(
        name,
        f"{__package__.rpartition('.')[0]}:turns",
        stop=(stop,),
        values={**defaults, **values},
        placement="ahead",
        training_placement="front",
        bos="written",
        pieces=True,
        drops_unanswered=True,
    )


# Vicuna gets a begin token at every turn, and nothing between its last word and the answer.
MG_VICUNA = _template(
    "mg_vicuna",
    "</s>",
    every_turn=True,
    before_system=f"{CURIOUS_USER} ",
    after_system="\n ",
    before_question="USER: ",
    after_question=" ASSISTANT:",
)
MG_LLAMA_3 = _template(
    "mg_llama_3",
    "<|eot_id|>",
    separator="",
    before_system="<|start_header_id|>system<|end_header_id|>\n\n",
    after_system="<|eot_id|>",
    before_question="<|start_header_id|>user<|end_header_id|>\n\n",
    after_question="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
)
MG_PHI_3 = _template(
    "mg_phi_3",
    "<|end|>",
    before_system="<|system|>",
    after_system="<|end|>\n",
    before_question="<|user|>",
    after_question="<|end|>\n<|assistant|>\n",
)
MG_QWEN = _template(
    "mg_qwen",
    "<|im_end|>",
    before_system="<|im_start|>system\n",
    after_system="<|im_end|>\n",
    before_question="<|im_start|>user\n",
    after_question="<|im_end|>\n<|im_start|>assistant\n",
)
