"""The templates of Video-ChatGPT: clips stay where training records put them, and follow the question in prompts."""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.builtin import CURIOUS_HUMAN, LLAVA_V0, VICUNA_V1

# The original joins the two sentences without a space.
UNDERSTANDS_VIDEO = (
    "You are Video-ChatGPT, a large vision-language assistant. "
    "You are able to understand the video content that the user provides, and assist the user with a variety of tasks "
    "using natural language."
    "Follow the instructions carefully and explain your answers in detail based on the provided video."
)
SEES_OPERATION = "You are a surgical assistant. You are given frames of an operation; answer from what is visible."
EXAMPLE = [
    ["Human", "What are the key differences between renewable and non-renewable energy sources?"],
    ["Assistant", "Renewable energy sources are those that can be replenished naturally.\n"],
]

VICUNA_V1_1 = replace(VICUNA_V1, name="vicuna_v1_1", placement="back", training_placement="keep")
VIDEO_CHATGPT = replace(VICUNA_V1_1, name="video_chatgpt_v1", system=UNDERSTANDS_VIDEO)
SURGICAL = replace(VICUNA_V1_1, name="surgical_v1", system=SEES_OPERATION)
DEFAULT = replace(
    LLAVA_V0,
    name="video_chatgpt_default",
    system=CURIOUS_HUMAN,
    values={"preset": EXAMPLE},
    placement="back",
    training_placement="keep",
)
# The original's option sep_video_conv_front: the clip, then the user's turn once more.
VICUNA_V1_1_FRONT = replace(
    VICUNA_V1, name="vicuna_v1_1_front", values={**VICUNA_V1.values, "joint": " USER: "}, placement="front"
)
