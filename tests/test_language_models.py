"""Language models without a vision side: read from transformers' folders, asked, served, trained, written back."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_training
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.inspect import inspect_model
from llavakit.conversation.encode import encode
from llavakit.errors import UserError

CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role + ' : ' + message.content + ' . ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "what colour is the square ?"}]


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral", "phi", "gpt2"])
def folder(request, tmp_path_factory):
    """A published folder: weights, tokenizer with a chat template, two ids that end an answer."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_training.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    options = dict(tiny.DECODERS[request.param])
    config = llavakit.LlavakitConfig(text_config=options, media={}).text_config
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = [2, 40]
    model.save_pretrained(folder)
    return folder


def test_logits_and_greedy_tokens_equal_transformers(folder):
    chat = llavakit.load(folder)
    assert not hasattr(chat.model.model, "vision_tower")
    assert chat.model.dtype == torch.float32  # the default on a CPU
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    # AutoTokenizer would build a tokenizer of its own kind around a Qwen2 folder's vocabulary
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    request = chat.request(QUESTION, max_new_tokens=12)
    assert request.input_ids.tolist() == ids
    with torch.no_grad():
        ours = chat.model(input_ids=torch.tensor([ids])).logits
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-4)
    wanted = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(ids) :]
    assert chat.engine.submit(request).result().token_ids == wanted.tolist()


def test_a_picture_is_refused_in_one_line(folder):
    chat = llavakit.load(folder)
    content = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what ?"}]
    with pytest.raises(UserError, match="takes text alone"):
        chat.chat([{"role": "user", "content": content}])


def test_round_trip_through_llavakit_and_back(folder, tmp_path):
    convert(folder, tmp_path / "ours", to="llavakit")
    convert(tmp_path / "ours", tmp_path / "theirs", to="hf")
    first, second = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path / "theirs"))
    ids = torch.tensor([[1, 5, 9, 11]])
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
    assert llavakit.load(tmp_path / "ours").chat(QUESTION, max_new_tokens=5) == llavakit.load(folder).chat(
        QUESTION, max_new_tokens=5
    )
    assert inspect_model(folder)["tokens"] == []


def test_labels_of_a_template_without_marks_are_the_answers(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [*QUESTION, {"role": "assistant", "content": "red"}, *QUESTION, {"role": "assistant", "content": "blue"}]
    encoded = encode(turns, "tokenizer", tokenizer)
    kept = [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label >= 0]
    assert tokenizer.decode(kept).split() == ["red", ".", "blue", "."]
    tokenizer.chat_template = CHAT.replace("message.content", "(message.content if loop.last else 'gone')")
    with pytest.raises(UserError, match="cannot be told apart"):
        encode(turns, "tokenizer", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode(turns, "tokenizer", tokenizer)


def test_trains_on_text_records(folder, tmp_path):
    from llavakit.training.recipe import parse_recipe
    from llavakit.training.run import train

    records = [
        {"messages": [*QUESTION, {"role": "assistant", "content": colour}]} for colour in ("red", "blue", "green") * 4
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    recipe = {
        "parts": {"init": {"language_model": str(folder)}, "media": {}, "vision_config": None, "template": "tokenizer"},
        "data": [{"name": "text", "path": str(tmp_path / "records.json")}],
        "stages": [
            {
                "name": "tune",
                "train": ["language_model"],
                "learning_rate": 1e-2,
                "max_steps": 6,
                "batch_size": 4,
                "log_steps": 1,
            }
        ],
        "output": str(tmp_path / "run"),
    }
    result = train(parse_recipe(recipe))
    losses = [entry["loss"] for entry in result.stages[0].metrics["log"]]
    assert losses[-1] < losses[0]
    assert llavakit.load(result.final).chat(QUESTION, max_new_tokens=3)
