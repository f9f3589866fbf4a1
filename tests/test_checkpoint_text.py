"""What a folder says about text: tokenizers are those of tokenizer.json, replies end at every id that ends one."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from PIL import Image
from tiny_checkpoints import TOKENIZER, write_classic
from tokenizers import Tokenizer

import llavakit
from llavakit.checkpoints.convert import convert, save
from llavakit.checkpoints.opening import load_processor, load_tokenizer, open_checkpoint
from llavakit.errors import CheckpointError

TEXTS = ("What is this, then?", "  two  blanks\nand 12,345 naïve 猫", "end")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_classic(tmp_path_factory.mktemp("source"))


def write_qwen(folder, name_class: bool) -> None:
    """A Qwen2 decoder's folder whose tokenizer.json is of another kind than transformers' Qwen2 class builds."""
    folder.mkdir()
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    specials = {"bos_token": None, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    if name_class:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", **specials}))


@pytest.mark.parametrize("name_class", [True, False])
@pytest.mark.parametrize("decoder", ["qwen2", "gpt2", "llama", "mistral"])
def test_ids_are_those_of_the_file_whatever_the_decoder(tmp_path, decoder, name_class):
    write_qwen(tmp_path / "text", name_class)
    plain = Tokenizer.from_file(str(TOKENIZER))
    config = tiny.config(decoder=decoder)
    tokenizer = load_tokenizer(tmp_path / "text", config=config)
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == plain.encode(text, add_special_tokens=False).ids


def test_ids_survive_every_layout(tmp_path):
    write_qwen(tmp_path / "text", name_class=True)
    plain = Tokenizer.from_file(str(TOKENIZER))
    config = tiny.config(decoder="qwen2")
    config.text_config.vocab_size = plain.get_vocab_size()
    torch.manual_seed(0)
    net = tiny.LlavakitForConditionalGeneration(config)
    processor = llavakit.LlavakitProcessor.from_config(config, load_tokenizer(tmp_path / "text", config=config))
    save(net.state_dict(), config, processor, tmp_path / "own")
    for layout in ("own",):
        tokenizer = load_processor(open_checkpoint(tmp_path / layout)).tokenizer
        for text in TEXTS:
            assert tokenizer(text).input_ids == plain.encode(text).ids, layout


# Ends of replies


def answer_ids(chat) -> list[int]:
    part = {"type": "image", "image": Image.new("RGB", (40, 20), "red")}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
    return chat.engine.submit(chat.request(messages, max_new_tokens=12)).result().token_ids


def test_a_reply_ends_at_every_id_and_the_file_travels(source, tmp_path):
    folder, encoder = source
    shutil.copytree(folder, tmp_path / "source")
    free = answer_ids(llavakit.load(tmp_path / "source", vision_tower=encoder))
    assert len(free) > 4
    generation = {"eos_token_id": [2, free[3]], "temperature": 0.9, "top_p": 0.6, "_from_model_config": True}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(generation))
    first = free.index(free[3])
    places = {"source": tmp_path / "source"}
    for form in ("llavakit", "original", "hf"):
        places[form] = tmp_path / form
        convert(tmp_path / "source", tmp_path / form, to=form, vision_tower=encoder)
        assert json.loads((tmp_path / form / "generation_config.json").read_text()) == generation
    for name in ("source", "llavakit", "original"):
        chat = llavakit.load(places[name], vision_tower=encoder)
        assert free[3] in chat.eos_token_ids, name
        assert answer_ids(chat) in (free[:first], free[: first + 1]), name
        assert chat.model.generation_config.eos_token_id == [2, free[3]]


@pytest.mark.parametrize("eos", ["</s>", [2, "x"], [2.5], -1, [True], {"a": 1}, 2**40])
def test_ids_that_are_none_are_one_line(source, tmp_path, eos):
    folder, encoder = source
    shutil.copytree(folder, tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is .*, it should be an id"):
        open_checkpoint(tmp_path / "source", vision_tower=encoder)
