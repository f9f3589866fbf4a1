"""An exported checkpoint in vLLM's own LLaVA, against transformers'; `make test-vllm` makes the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm")

TOKENIZER = Path(__file__).parent / "golden" / "llava-1.5" / "tokenizer-sp" / "tokenizer_nonlegacy.json"
SIDE, PATCH, NEW = 56, 14, 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny random LLaVA-1.5, written with `--to hf`; heads are as wide as vLLM's kernels ask for."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from llavakit import LlavakitConfig, LlavakitForConditionalGeneration, LlavakitProcessor
    from llavakit.model.convert import convert, save

    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), **specials)
    torch.manual_seed(0)
    layers = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    config = LlavakitConfig(
        text_config={
            "model_type": "llama",
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **layers,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "num_hidden_layers": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": 16,
            **layers,
        },
        connector={"type": "mlp", "depth": 2},
        media={"image": {"views": {"type": "pad", "size": SIDE}, "arrange": {"type": "flat"}}},
        image_token_id=len(tokenizer),
        template="vicuna_v1",
        system="llava-1.5",
    )
    model = LlavakitForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("vllm")
    save(model.state_dict(), config, LlavakitProcessor.from_config(config, tokenizer), folder / "native")
    convert(folder / "native", folder / "hf", to="hf")
    return folder / "hf"


def test_vllm_and_transformers_continue_an_exported_model_alike(exported):
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    prompts = ["USER: <image>\nWhat is this? ASSISTANT:", "<image>"]
    processor = AutoProcessor.from_pretrained(exported)
    theirs = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    wanted = []
    for prompt in prompts:
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            out = theirs.generate(**inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
        wanted.append(out[0, inputs["input_ids"].shape[1] :].tolist())

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = vllm.LLM(str(exported), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=2, seed=0)
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW)
    requests = [{"prompt": prompt, "multi_modal_data": {"image": image}} for prompt in prompts]
    got = [list(answer.outputs[0].token_ids) for answer in engine.generate(requests, settings)]
    del engine  # ends its processes
    assert got == wanted
