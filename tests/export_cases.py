"""Exports to transformers' class: one tiny model per pair of encoder and decoder, and what transformers makes of it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from llavakit import LlavakitProcessor
from llavakit.checkpoints.convert import convert, save
from llavakit.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "llava-1.5"
ENCODERS = ("clip", "siglip", "dinov2")
DECODERS = ("llama", "qwen2", "mistral", "phi", "gpt2")
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
VIEWS: dict[str, dict[str, Any]] = {
    "clip": {"type": "pad", "size": tiny.SIZE},
    "siglip": {"type": "squash", "size": tiny.SIZE, "resample": "bilinear", **HALF},
    "dinov2": {"type": "square", "size": tiny.SIZE + 8, "crop": tiny.SIZE, "image_mean": [0.4, 0.5, 0.6]},
}
TEMPLATES = {"qwen2": "qwen_1_5", "mistral": "mistral_instruct"}


def tokenizer_of(decoder: str) -> PreTrainedTokenizerFast:
    if decoder in ("qwen2", "phi", "gpt2"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(GOLDEN / "tokenizer-bpe" / "tokenizer_bpe.json"), eos_token="<|endoftext|>"
        )
        return tokenizer
    name = "legacy" if decoder == "mistral" else "nonlegacy"
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / f"tokenizer-sp/tokenizer_{name}.json"), **specials)


def write(folder: Path, encoder: str, decoder: str, spare: int = 0, **fields: Any) -> LlavakitProcessor:
    """A model in llavakit's layout.

    Args:
        spare: Rows of the vocabulary beyond the tokenizer's.
    """
    tokenizer = tokenizer_of(decoder)
    views, connector = fields.pop("views", VIEWS[encoder]), fields.pop("connector", None)
    text = dict(tiny.DECODERS[decoder]) | {"vocab_size": len(tokenizer) + spare}
    defaults = {
        "text_config": text,
        "media": {"image": {"views": views, "arrange": {"type": "flat"}}},
        "image_token_id": len(tokenizer),
        "template": TEMPLATES.get(decoder, "v1"),
        "system": "llava-1.5",
    }
    config = tiny.config(encoder=encoder, decoder=decoder, **(defaults | fields))
    config.connector = connector or config.connector
    torch.manual_seed(0)
    net = tiny.LlavakitForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.15)  # biases too: the head of Phi has one
    processor = LlavakitProcessor.from_config(config, tokenizer)
    save(net.state_dict(), config, processor, folder)
    return processor


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def conversations() -> list[list[dict[str, Any]]]:
    def user(*parts: Any) -> dict[str, Any]:
        return {
            "role": "user",
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
                for part in parts
            ],
        }

    return [
        [user(picture(90, 40), "What is this?")],
        [user("Compare ", picture(30, 55, 1), " and ", picture(64, 64, 2), ", please.")],
        [user(picture(20, 20), "Name it."), {"role": "assistant", "content": "A cat."}, user("Why?")],
        [user("Nothing to see here.")],
    ]


def worst(own: Path, exported: Path) -> float:
    """The largest difference of pixels and logits between llavakit's model and its export; ids must be equal."""
    import llavakit

    chat = llavakit.load(own)
    processor = AutoProcessor.from_pretrained(exported)
    model = LlavaForConditionalGeneration.from_pretrained(exported).eval()
    found = [0.0]
    for messages in conversations():
        request = chat.request(messages)
        theirs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert theirs["input_ids"][0].tolist() == request.input_ids.tolist(), messages
        with torch.no_grad():
            logits = model(**theirs).logits
            inputs = {"input_ids": request.input_ids[None], "attention_mask": theirs["attention_mask"]}
            if request.pixel_values:
                views = torch.stack(request.pixel_values)
                found.append(float((views - theirs["pixel_values"]).abs().max()))
                inputs |= {"pixel_values": views, "visual_sizes": request.visual_sizes}
                inputs |= {"visual_modalities": request.visual_modalities}
            mine = chat.model(**inputs).logits
        found.append(float((mine - logits[..., : mine.shape[-1]]).abs().max()))
    return max(found)


def matrix(folder: Path) -> Iterator[tuple[str, str, float | str]]:
    """Encoder, decoder, and the largest difference of the export, or why there is none."""
    for encoder in ENCODERS:
        for decoder in DECODERS:
            own, exported = folder / f"{encoder}-{decoder}", folder / f"{encoder}-{decoder}-hf"
            write(own, encoder, decoder)
            try:
                convert(own, exported, to="hf")
            except UserError as error:
                yield encoder, decoder, str(error)
                continue
            yield encoder, decoder, worst(own, exported)


def main() -> None:
    """Print the matrix; `make test-exports`."""
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for encoder, decoder, result in matrix(Path(folder)):
            failed |= not isinstance(result, str) and not result < 1e-5
            said = result.partition("'hf': ")[2] if isinstance(result, str) else f"largest difference {result:.1e}"
            print(f"{encoder:8} {decoder:8} {'refused: ' * isinstance(result, str)}{said}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
