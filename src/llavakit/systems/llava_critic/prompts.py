"""What a judge is asked: LLaVA-Critic's two released prompts, and those of the benchmarks that it was measured on.

All are reproduced byte for byte, slips included ("answer answers", the blank at the end of the pointwise prompt): a
model that was trained on them answers differently to others. Square brackets are part of the text. Source: the hub card
of `lmms-lab/llava-critic-7b`; the harness lmms-eval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llavakit.conversation.messages import Message
from llavakit.evaluation.comparisons import Comparison, Verdict
from llavakit.evaluation.reviews import review_content
from llavakit.systems.llava_critic.verdicts import critic_verdict

_TASK = " explain your reasoning with specific details. Your task is provided as follows:\nQuestion: [{question}]\n"
_GIVEN = (
    "Given an image and a corresponding question, please serve as an unbiased and fair judge to evaluate the quality "
)
_MODEL = "provided by a Large Multimodal Model (LMM). "
PAIRWISE = _GIVEN + "of the answers " + _MODEL + "Determine which answer is better and" + _TASK
POINTWISE = _GIVEN + "of answer answers " + _MODEL + "Score the response out of 100 and" + _TASK


def pairwise_prompt(question: str, first: str, second: str) -> str:
    """The released prompt that compares two answers; texts go in as they are."""
    asked = PAIRWISE.replace("{question}", question)
    return f"{asked}The first response: [{first}]\nThe second response: [{second}]\nASSISTANT:\n"


def pointwise_prompt(question: str, response: str) -> str:
    """The released prompt that scores one answer out of 100; it ends with a newline and a blank."""
    return f"{POINTWISE.replace('{question}', question)}The LMM response: [{response}]\nASSISTANT:\n "


def judge_messages(prompt: str, media: Sequence[dict[str, Any]]) -> list[Message]:
    """The one user turn in which a judge sees media and a prompt, written `<image>\\n` and then the prompt."""
    text = f"\n{prompt}" if media else prompt
    return [{"role": "user", "content": [*map(dict, media), {"type": "text", "text": text}]}]


# Benchmarks with a judge's prompt of their own

WILDER_RULES = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image shown to you. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance. Assume assistant "
    "1 always receive a score of 10 and is the correct answer.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)


def wilder_prompt(question: str, reference: str, answer: str, rules: str = WILDER_RULES) -> str:
    """LLaVA-Wilder: an answer beside the reference answer, which is shown first."""
    return review_content(None, question, reference, answer, rules)


ARENA_BASELINE = "claude-3-sonnet-20240229"
ARENA_TASK = (  # llavakit's own words; the published system text asks for the same
    "Two AI assistants answered a user's question about an image. First answer the question yourself. Then compare "
    "both answers with yours: are they right, helpful, relevant and concise, and what do they leave out? End with "
    "exactly one of these verdicts: [[A>>B]] if assistant A is much better, [[A>B]] if A is slightly better, "
    "[[A=B]] if both are about the same, [[B>A]] if B is slightly better, [[B>>A]] if B is much better."
)


def arena_prompt(question: str, baseline: str, answer: str) -> str:
    """WildVision's user turn: the baseline's answer is A."""
    blocks = [f"<|User Prompt|>\n{question}"]
    for name, text in (("A", baseline), ("B", answer)):
        blocks.append(f"<|The Start of Assistant {name}'s Answer|>\n{text}\n<|The End of Assistant {name}'s Answer|>")
    return "\n\n".join(blocks)


_REWARD_TASK = (
    " You are a highly capable multimodal AI assistant tasked with evaluating answers to visual questions. Please "
    "analyze the following image and question, then determine which of the two provided answers is better.\n\n"
)
_REWARD_CRITERIA = (
    "Please evaluate both answers based on the following criteria:\n"
    "1. Accuracy: How well does the answer align with the visual information in the image?\n"
    "2. Completeness: Does the answer fully address all aspects of the question?\n"
    "3. Clarity: Is the answer easy to understand and well-articulated?\n"
    "4. Relevance: Does the answer directly relate to the question and the image?\n\n"
    "After your evaluation, please:\n"
    "1. Explain your reasoning for each criterion.\n"
    "2. Provide an overall judgment on which answer is better (Answer 1 or Answer 2). For example: Overall Judgment: "
    "Answer X is better.\n\n"
    "Your response should be structured and detailed, demonstrating your understanding of both the visual and textual "
    "elements of the task."
)


def reward_swapped(responses: Sequence[str]) -> bool:
    """Whether VL-RewardBench shows the second answer first: where both together have an odd number of characters."""
    return sum(map(len, responses)) % 2 == 1


def reward_prompt(question: str, responses: Sequence[str]) -> str:
    """VL-RewardBench: which of two answers is better."""
    first, second = reversed(responses) if reward_swapped(responses) else responses
    return f"{_REWARD_TASK}Question: {question}\n\nAnswer 1: {first}\n\nAnswer 2: {second}\n\n{_REWARD_CRITERIA}"


class CriticComparison(Comparison):
    """`critic`: the released pairwise prompt, read as LLaVA-Critic writes its verdicts."""

    def messages(
        self, media: Sequence[Mapping[str, Any]], question: str, first: str, second: str
    ) -> list[dict[str, Any]]:
        return judge_messages(pairwise_prompt(question, first, second), media)

    def verdict(self, reply: str) -> Verdict | None:
        return critic_verdict(reply)
