"""LLaVA-NeXT-Interleave's golden components: arrangements, logits, prompts, frames; the benchmark in its own file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llavakit.conversation.messages import Message, from_llava
from llavakit.media.frame_sampling import choose
from llavakit.proof.entries import prompt_ids, text_processor
from llavakit.proof.golden import Case, Example, examples, take
from llavakit.proof.siglip_qwen import SharedComponents
from llavakit.systems.llava_next_interleave import parity_benchmark
from llavakit.systems.llava_next_interleave.checkpoint import InterleaveLayout

SHARED = SharedComponents(InterleaveLayout())
EVALUATION, RESTARTING = "qwen_1_5_pieces", "qwen_1_5_pieces_restarting"


def tokenizer_of(case: Case) -> Any:
    """The case's tokenizer with Qwen's special tokens."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(case.sibling("tokenizer.json", "interleave_eval_prompt/tokenizer.json")),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def messages_of(turns: list[Mapping[str, Any]]) -> tuple[list[Message], bool]:
    """Messages of turns with as many pictures as they have marks, and whether the last turn is left open."""
    turns = take(turns)
    opened = turns[-1]["value"] is None
    kept = turns[:-1] if opened else turns
    pictures = sum(turn["value"].count("<image>") for turn in kept)
    record = {"conversations": kept} | ({"image": ["-"] * pictures} if pictures else {})
    return from_llava(record), opened


def evaluation_prompt(case: Case) -> Iterator[Example]:
    """Ids of the evaluation script's prompts."""
    processor = text_processor(tokenizer_of(case), EVALUATION)

    def ids(turns: list[Mapping[str, Any]]) -> list[int]:
        messages, opened = messages_of(turns)
        return prompt_ids(processor, messages, add_generation_prompt=opened)

    yield from examples(ids, case.inputs["conversations"], "ids")


def multiturn_prompt(case: Case) -> Iterator[Example]:
    """Ids of every call of a conversation whose answers the model gave itself."""
    processor = text_processor(tokenizer_of(case), RESTARTING)

    def calls(sample: Mapping[str, Any]) -> list[list[int]]:
        messages, _ = messages_of(sample["conversations"])
        if messages[0]["role"] == "assistant":
            messages = messages[1:]
        outputs, found, asked = iter(sample["model_outputs"]), [], []
        for message in messages:
            if message["role"] == "user":
                asked.append(message)
                found.append(prompt_ids(processor, asked, add_generation_prompt=True))
            else:
                given = next(outputs, None)
                text = processor.tokenizer.decode(given or [])
                content = [{"type": "text", "text": text}]
                asked.append({"role": "assistant", "content": content, "token_ids": given})
        return found

    yield from examples(calls, case.inputs["samples"], "calls")


def demo_frames(case: Case) -> Iterator[Example]:
    """Frames that the demo keeps."""

    def kept(query: Mapping[str, Any]) -> list[int]:
        sampling = {"type": "strided", "frames": query["num_frames"]}
        total = query["total_frames"]
        return choose(sampling, total=total, average_rate=1.0, timestamps=range(total))

    yield from examples(kept, case.inputs["queries"], "frames")


ADAPTERS = {
    "token_layout": SHARED.token_layout,
    "e2e_logits": SHARED.end_to_end,
    "interleave_eval_prompt": evaluation_prompt,
    "interleave_multiturn_prompt": multiturn_prompt,
    "interleave_demo_frames": demo_frames,
    **parity_benchmark.ADAPTERS,
}
