"""MedM-VL's templates: Vicuna's wording for every language model, whose own end token closes an answer."""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.builtin import PLAIN, VICUNA_V1
from llavakit.conversation.template import Rounds, Template


def _vicuna(name: str, end: str) -> Template:
    return Template(
        name,
        "vicuna",
        VICUNA_V1.system,
        stop=(end,),
        values={"end": end, "trims": True},
        placement="keep",
        bos="before_text",
        rounds=Rounds(end=end, answer=" ASSISTANT:", in_place=True),
    )


VICUNA_LLAMA = _vicuna("vicuna_llama", "</s>")
VICUNA_LLAMA_3 = _vicuna("vicuna_llama_3", "<|eot_id|>")
VICUNA_QWEN_2 = _vicuna("vicuna_qwen_2", "<|im_end|>")
VICUNA_PHI = _vicuna("vicuna_phi", "<|endoftext|>")
# pretraining: the media item, then the stripped caption, without an end mark
CAPTION = replace(PLAIN, name="caption", stop=(), values={"end": "", "trims": True}, bos="before_text")
