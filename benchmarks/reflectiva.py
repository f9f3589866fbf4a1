"""ReflectiVA beside its original's way: one question with 40 passages, each of about 300 tokens.

    python benchmarks/reflectiva.py [--passages 40] [--repeat 2] [--layers 4] [--hidden 512]

The original gives the model every passage in a prompt of its own, picture and all: one prompt that asks whether
passages are needed, one for every judgement, one for the answer. llavakit computes what the prompts share once and
judges several passages in one forward pass. Both run on the same random weights (CLIP's 24 x 24 patches at 336 px and
Llama's shape, both narrow; the two rows of the head that judge are set so that a tenth is kept), float32, greedy, in
llavakit's engine: what is compared is the way, not two programs. Of every judgement the original's way generates the
first token alone; the original goes on to the end of the reply, up to 128 tokens, so its share here is the least it can
be. Time is processor time of the process, in turns, medians.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch starts its threads

import argparse
import platform
import random
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import transformers
from PIL import Image

from llavakit.conversation.builtin import SEES
from llavakit.generation.chat import Chat
from llavakit.generation.engine import Engine
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.retrieval.entries import Entry, Hit
from llavakit.retrieval.retriever import Retriever
from llavakit.systems.reflectiva.prompts import answer, judgement
from llavakit.systems.reflectiva.responder import Reflection
from llavakit.systems.reflectiva.tokens import NO_RELEVANT, RELEVANT, TOKENS

TEMPLATE_MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORDS = ["the", "a", "of", "in", "was", "built", "by", "near", "river", "bridge", "tower", "king", "stone", "year"]
NEW_TOKENS = 8
SHARE = 0.1  # of the passages that are kept, about


def passages(count: int, tokens: int) -> list[str]:
    """Texts of so many words, each of one token."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=tokens)) + "." for _ in range(count)]


def make_chat(hidden: int, layers: int, texts: list[str]) -> Chat:
    """A model of Llama's and CLIP's shape, narrow, with random weights."""
    tokenizer = tiny_tokenizer(
        [SEES, "Consider this paragraph: ", *texts], 3000, specials=("<image>", *TEMPLATE_MARKS, *TOKENS)
    )
    width = hidden // 4
    torch.manual_seed(0)
    config = LlavakitConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": hidden * 14336 // 4096,
            "num_hidden_layers": layers,
            "num_attention_heads": max(hidden // 64, 1),
            "num_key_value_heads": max(hidden // 256, 1),
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32768,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 24,
            "num_attention_heads": max(width // 64, 1),
            "image_size": 336,
            "patch_size": 14,
        },
        media={"image": {"views": {"type": "pad", "size": 336}}},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        template="reflectiva",
    )
    net = LlavakitForConditionalGeneration(config).eval()
    return Chat(net, LlavakitProcessor.from_config(config, tokenizer))


def take_sides(chat: Chat, question: list[Any], texts: list[str]) -> None:
    """Set the two rows of the head that judge, so that a few of the passages are kept."""
    seen: list[torch.Tensor] = []
    hook = chat.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    chat.next_logits([judgement(question, text) for text in texts])
    hook.remove()
    states = torch.cat(seen)
    mean = states.mean(0)
    side = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(1))
    side = side - mean * ((states @ side).quantile(SHARE) / (mean @ mean))
    ids = chat.tokenizer.convert_tokens_to_ids([RELEVANT, NO_RELEVANT])
    with torch.no_grad():
        chat.model.lm_head.weight[ids] = torch.stack([mean - side / 2, mean + side / 2])
    chat.engine.forget()


class Found(Retriever):
    """The passages, as one page."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = tuple(texts)

    def retrieve(self, queries: Any, k: int, *, keep: Any = None) -> list[list[Hit]]:
        return [[Hit(0, 1.0, Entry("page", self.texts))] for _ in queries]


def original(chat: Chat, question: list[Any], texts: list[str]) -> tuple[list[bool], str]:
    """Every prompt by itself: which passages are kept, and the answer. The picture is cut once, as in the original."""
    first = chat.request(question, max_new_tokens=1)

    def reply(messages: list[Any], tokens: int) -> Any:
        ids = chat.processor.encode(messages, add_generation_prompt=True, pixels=False)["input_ids"]
        sampling = replace(first.sampling, max_new_tokens=tokens)
        return chat.engine.generate([replace(first, input_ids=ids, answers=None, sampling=sampling)])[0]

    reply(question, 1)
    relevant = chat.tokenizer.convert_tokens_to_ids(RELEVANT)
    kept = [reply(judgement(question, text), 1).token_ids[0] == relevant for text in texts]
    chosen = [text for text, keep in zip(texts, kept, strict=True) if keep]
    return kept, reply(answer(question, chosen), NEW_TOKENS).text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("passages", 40), ("tokens", 300), ("repeat", 2), ("layers", 4), ("hidden", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = passages(options.passages, options.tokens)
    ours = make_chat(options.hidden, options.layers, texts)
    plain = Chat(ours.model, ours.processor)
    plain.engine = Engine(ours.model, ours.tokenizer, max_batch=1, prefix_bytes=0, feature_bytes=0)
    picture = Image.effect_noise((640, 480), 80).convert("RGB")
    question = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Who built it?"}]}
    ]
    take_sides(ours, question, texts)
    prefix = len(ours.request(question).ids())
    longest = len(ours.request(judgement(question, texts[0])).ids())
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{options.passages} passages; a question has {prefix} positions, with a passage {longest}")
    responder = Reflection(ours, store=Found(texts), retrieve="always")
    times: dict[str, list[float]] = {"original": [], "llavakit": []}
    for _ in range(options.repeat):
        start = time.process_time()
        kept, said = original(plain, question, texts)
        times["original"].append(time.process_time() - start)
        ours.engine.forget()
        start = time.process_time()
        # the whole way: the question is asked first, as the original does
        ours.chat(question, max_new_tokens=1)
        found = responder.submit(question, max_new_tokens=NEW_TOKENS).result()
        times["llavakit"].append(time.process_time() - start)
        if found.content != said:
            raise SystemExit(f"answers differ: {said!r} and {found.content!r}")
        print(f"original {times['original'][-1]:.2f} s, llavakit {times['llavakit'][-1]:.2f} s", flush=True)
        judged = [own["kept"] for own in dict(found.traces)["retrieval"]["passages"]]
        if judged != kept:
            raise SystemExit(f"decisions differ: {kept} and {judged}")
    medians = {name: statistics.median(own) for name, own in times.items()}
    print(f"kept {sum(kept)} of {len(kept)} in both ways")
    for name, seconds in medians.items():
        print(f"{name:10} {seconds:8.2f} s")
    print(f"ratio      {medians['llavakit'] / medians['original']:8.3f}")


if __name__ == "__main__":
    main()
