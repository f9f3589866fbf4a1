"""Templates of LLaVA-NeXT-Interleave: Qwen's turns with pictures where the text has them.

`qwen_1_5_interleaved` is the training form, and the one to use. The other two write the prompts of the authors'
evaluation script, on which the published figures rest: a prompt's pieces are tokenised one by one, a newline of its own
follows every picture, and a turn of the assistant in front is dropped. In a conversation of several turns the script
begins every turn of the user with the system line again (`..._restarting`).
"""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.builtin import ASSISTANT_HEADER, QWEN

INTERLEAVED = replace(QWEN, name="qwen_1_5_interleaved", placement="keep")
PUBLISHED_EVALUATION = replace(
    INTERLEAVED,
    name="qwen_1_5_pieces",
    file="llavakit.systems.llava_next_interleave:pieces",
    after_media="\n",
    breaks=("<|im_start|>user\n", ASSISTANT_HEADER, "<image>\n"),
    prompts_keep_first_answer=False,
)
PUBLISHED_TURNS = replace(
    PUBLISHED_EVALUATION,
    name="qwen_1_5_pieces_restarting",
    file="llavakit.systems.llava_next_interleave:restarting",
    as_generated=True,
)
