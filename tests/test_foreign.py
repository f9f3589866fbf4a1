"""Models of other families, run by transformers' own classes: the same answers, and the responder's contract."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_foreign
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import llavakit
from llavakit.cli import app as cli
from llavakit.conversation.turns import Tool
from llavakit.errors import CheckpointError, UserError
from llavakit.evaluation.run import evaluate
from llavakit.generation import SamplingParams
from llavakit.generation.foreign import TransformersResponder
from llavakit.generation.identity import identity_of
from llavakit.generation.search import stage_beam_search

KINDS = ("mllama", "gemma3", "mamba")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("foreign")
    return {kind: getattr(tiny_foreign, kind)(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, TransformersResponder]:
    return {kind: llavakit.load(folder, device="cpu") for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, models: dict[str, TransformersResponder]) -> TransformersResponder:
    return models[request.param]


def test_identity_is_content(folders: dict[str, Path], tmp_path: Path):
    """Another path is the same model; another chat template or picture size is another one."""
    moved = shutil.copytree(folders["gemma3"], tmp_path / "moved")
    first = identity_of(llavakit.load(folders["gemma3"], device="cpu"))
    assert identity_of(llavakit.load(moved, device="cpu")) == first
    template = moved / "chat_template.jinja"
    template.write_text(template.read_text() + "{# other #}x")
    other = identity_of(llavakit.load(moved, device="cpu"))
    assert {key for key in first if first[key] != other[key]} == {"template"}
    for file in moved.glob("*processor_config.json"):
        file.write_text(re.sub(r'"(height|width)": \d+', r'"\1": 14', file.read_text()))
    third = identity_of(llavakit.load(moved, device="cpu"))
    assert {key for key in other if other[key] != third[key]} == {"media"}


def asked(model: TransformersResponder, text: str = "What is this?", colour: str = "red") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if model.modalities:
        parts.insert(0, {"type": "image", "image": Image.new("RGB", (32, 16), colour)})
    return [{"role": "user", "content": parts}]


def own_inputs(model: TransformersResponder, messages: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """What transformers' own processor makes of a conversation."""
    content = [part if part["type"] == "image" else dict(part) for part in messages[0]["content"]]
    conversation = [{"role": "user", "content": content if model.modalities else content[-1]["text"]}]
    if prefix:
        reply = [{"type": "text", "text": prefix}] if model.modalities else prefix
        conversation.append({"role": "assistant", "content": reply})
    options = {"continue_final_message": True} if prefix else {"add_generation_prompt": True}
    return model.processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def test_greedy_answers_are_those_of_generate(model: TransformersResponder) -> None:
    assert isinstance(model, TransformersResponder)
    for colour in ("red", "blue"):  # nothing of one request is left in the next
        messages = asked(model, colour=colour)
        inputs = own_inputs(model, messages)
        wanted = model.model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        response = model.submit(messages, max_new_tokens=10)
        answer = response.result()
        assert answer.token_ids == wanted.tolist()
        assert answer.text == model.tokenizer.decode(wanted, skip_special_tokens=True)
        assert response.usage.prompt_tokens == inputs["input_ids"].shape[1]
        assert response.usage.completion_tokens == len(wanted)
        assert "".join(model.stream(messages, max_new_tokens=10)) == answer.content


def test_several_replies_share_a_prompt_and_draw_apart(model: TransformersResponder) -> None:
    sampling = SamplingParams(max_new_tokens=6, temperature=1.0, seed=3, eos_token_ids=())
    alone = model.submit(asked(model), sampling).result()
    several = model.submit(asked(model), sampling, n=3).result()
    assert several[0].token_ids == alone.token_ids
    assert len({tuple(answer.token_ids) for answer in several}) == 3
    greedy = model.submit(asked(model), max_new_tokens=6, n=2).result()
    assert greedy[0].token_ids == greedy[1].token_ids


def test_likelihoods_are_the_models(model: TransformersResponder) -> None:
    replies = ["A red square", "blue"]
    scores = model.score(asked(model), replies)
    for reply, score in zip(replies, scores, strict=True):
        inputs = own_inputs(model, asked(model), reply)
        ids = inputs["input_ids"][0].tolist()
        with torch.no_grad():
            logprobs = model.model(**inputs).logits[0].log_softmax(-1)
        places = range(len(ids) - len(score.token_ids), len(ids))
        assert list(score.token_ids) == [ids[place] for place in places]
        assert list(score.logprobs) == pytest.approx([float(logprobs[p - 1, ids[p]]) for p in places], abs=1e-3)
        assert model.tokenizer.decode(score.token_ids).strip() == reply
    (plain,) = model.score("What is ", ["red"])
    assert plain.token_ids == model.score("What is", [" red"])[0].token_ids
    assert ids.count(model.tokenizer.bos_token_id) == 1


def test_replies_are_forked_from_prefixes(model: TransformersResponder) -> None:
    messages = asked(model)
    whole = model.submit(messages, max_new_tokens=8, eos_token_ids=()).result()
    root = model.begin(messages)
    sampling = SamplingParams(max_new_tokens=3, eos_token_ids=(), n=2)
    ((branch, _),) = model.expand([root], sampling)
    ((longer, _),) = model.expand([branch], SamplingParams(max_new_tokens=5, eos_token_ids=(), n=2))
    assert list(longer.ids) == whole.token_ids
    marker = whole.text.strip()[0] if whole.text.strip() else " "
    found = stage_beam_search(model.expand, root, sampling, [marker], lambda marker, candidates: candidates[0])
    assert found.text
    (answer,) = model.continue_from(messages, "A red", SamplingParams(max_new_tokens=4, eos_token_ids=()))
    inputs = own_inputs(model, messages, "A red")
    wanted = model.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert answer.token_ids == wanted[0, inputs["input_ids"].shape[1] :].tolist()


def test_stop_strings_and_log_probabilities(models: dict[str, TransformersResponder]) -> None:
    model = models["mllama"]
    whole = model.submit(asked(model), max_new_tokens=8).result()
    stop = whole.text[2:4]
    answer = model.submit(asked(model), max_new_tokens=8, stop=stop, logprobs=2).result()
    assert (answer.text, answer.finish_reason, answer.stop) == (whole.text.split(stop)[0], "stop", stop)
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    assert all(len(entry.top) == 2 for entry in answer.logprobs)
    penalised = model.submit(asked(model), max_new_tokens=8, repetition_penalty=1.8).result()
    inputs = own_inputs(model, asked(model))
    wanted = model.model.generate(**inputs, max_new_tokens=8, do_sample=False, repetition_penalty=1.8)
    assert penalised.token_ids == wanted[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["mllama", "gemma3"])
def test_a_placeholder_in_a_text_is_text(models: dict[str, TransformersResponder], kind: str) -> None:
    model = models[kind]
    for text in (model.processor.image_token, "<boi>" if kind == "gemma3" else "<|image|>"):
        assert isinstance(model.chat(model.escape(asked(model, f"Is {text} a tag?")), max_new_tokens=2), str)
    assert isinstance(model.chat(asked(model, f"Is {model.processor.image_token} a tag?"), max_new_tokens=2), str)


@pytest.mark.parametrize(
    ("kind", "part", "problem"),
    [
        (
            "mllama",
            {"type": "video", "video": "a.mp4"},
            r"messages\.0\.content\.0: this model takes no video here; .*image",
        ),
        ("mamba", {"type": "image", "image": "a.png"}, "takes no image here; it takes text alone"),
        ("mllama", {"type": "image", "image": "none.png"}, r"none\.png"),
        ("gemma3", {"type": "text", "text": "word " * 300}, "positions are needed, this model has 256"),
    ],
)
def test_what_the_model_does_not_take_is_one_line(
    models: dict[str, TransformersResponder], kind: str, part: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        models[kind].chat([{"role": "user", "content": [part]}])
    with pytest.raises(UserError, match="n is 17"):
        models[kind].chat(asked(models[kind]), n=17)


def test_tools_and_cancelling(models: dict[str, TransformersResponder]) -> None:
    model = models["mllama"]
    with_tools = model.submit(asked(model), max_new_tokens=1, tools=[Tool("find", "Finds things")])
    with_tools.result()
    plain = model.submit(asked(model), max_new_tokens=1)
    plain.result()
    assert with_tools.usage.prompt_tokens > plain.usage.prompt_tokens
    response = model.submit(asked(model), max_new_tokens=200, eos_token_ids=())
    next(iter(response))
    response.cancel()
    assert response.result().finish_reason in ("cancelled", "length")
    assert model.chat(asked(model), max_new_tokens=2) is not None  # the turn was given back


@pytest.mark.parametrize("problem", ["missing", "unexpected", "template", "encoder-decoder", "cannot open"])
def test_broken_folders_are_one_line(folders: dict[str, Path], tmp_path: Path, problem: str) -> None:
    folder = shutil.copytree(folders["gemma3"], tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if problem == "missing":
        weights.pop(sorted(weights)[3])
    elif problem == "unexpected":
        weights["model.nonsense"] = torch.zeros(2)
    elif problem == "template":
        (folder / "chat_template.jinja").unlink()
    elif problem == "encoder-decoder":
        config = {"model_type": "florence2"}
    else:
        config["text_config"]["num_attention_heads"] = 5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=problem) as caught:
        llavakit.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", ["published", "of the classes"])
def test_both_spellings_of_mllamas_tensors_load(
    folders: dict[str, Path], models: dict[str, TransformersResponder], tmp_path: Path, names: str
) -> None:
    model = models["mllama"]
    folder = shutil.copytree(folders["mllama"], tmp_path / "mllama")
    tensors = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    if names == "published":  # Llama 3.2 Vision, and LLaVA-CoT made from it
        language, further = "model.language_model.", {"lm_head.": "language_model.lm_head."}
        renames = {language: "language_model.model.", "model.": "", **further}
        tensors = {
            next((new + name[len(old) :] for old, new in renames.items() if name.startswith(old)), name): tensor
            for name, tensor in tensors.items()
        }
        assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} < set(tensors)
        assert {"multi_modal_projector.weight", "vision_model.class_embedding"} < set(tensors)
    else:
        assert {"model.language_model.embed_tokens.weight", "lm_head.weight"} < set(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    again = llavakit.load(folder, device="cpu")
    assert all(torch.equal(value, model.model.state_dict()[key]) for key, value in again.model.state_dict().items())
    assert again.chat(asked(model), max_new_tokens=6) == model.chat(asked(model), max_new_tokens=6)


def test_chat_and_evaluation_take_them(folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (32, 16), "red").save(picture)
    options = ["--image", str(picture), "--max-new-tokens", "4", "--device", "cpu"]
    assert cli.run(["chat", str(folders["mllama"]), "--prompt", "What is this?", *options]) == 0
    said = capsys.readouterr().out.strip()
    model = llavakit.load(folders["mllama"], device="cpu")
    assert said == model.chat(asked(model), max_new_tokens=4)
    questions = tmp_path / "q.jsonl"
    row = {"question_id": 1, "image": "a.png", "text": "What is this?", "answer": "x", "type": "t"}
    questions.write_text(json.dumps(row) + "\n")
    evaluate(model, "exact_match", questions, tmp_path / "p.jsonl", max_new_tokens=4)
    assert json.loads((tmp_path / "p.jsonl").read_text())["text"] == said


@pytest.mark.parametrize(("kind", "encoded"), [("mllama", 1), ("gemma3", 3)])  # windows cannot be cut
def test_forks_and_further_questions_encode_a_picture_once(models, kind, encoded, tmp_path) -> None:
    model = models[kind]
    bare = TransformersResponder(model.model, model.processor, prefix_bytes=0)
    kept = TransformersResponder(model.model, model.processor)
    sampling = SamplingParams(max_new_tokens=5, eos_token_ids=(), n=3, temperature=1.0, seed=3)
    image = asked(model)[0]["content"][0]

    def answers(responder):
        used = []
        root = responder.begin(asked(model))
        (branches,) = responder.expand([root], sampling, used.append)
        (branches,) = responder.expand([branches[1]], sampling, used.append)
        texts = [branch.ids for branch in branches]
        for question in ("And what is that?", "And what is this?"):
            turn = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
            response = responder.submit(turn, max_new_tokens=4, eos_token_ids=())
            texts.append(tuple(response.result().token_ids))
            used.append(response.usage)
        texts.append(
            tuple(responder.submit([{"role": "user", "content": "Hello."}], max_new_tokens=3).result().token_ids)
        )
        return texts, used

    found, used = answers(kept)
    wanted, whole = answers(bare)
    assert found == wanted
    assert sum(one.encoded for one in used) == encoded
    assert sum(one.encoded for one in whole) == 4
    again = [one for one in used if one.prompt_tokens]
    assert [one.cached_tokens > 0 for one in again] == [False, True, *[encoded == 1] * 2]
    other = tmp_path / "other.png"
    Image.new("RGB", (12, 12), "blue").save(other)
    turn = [{"role": "user", "content": [{"type": "image", "image": str(other)}, {"type": "text", "text": "What?"}]}]
    first = kept.submit(turn, max_new_tokens=4, eos_token_ids=())
    assert first.result().token_ids == bare.submit(turn, max_new_tokens=4, eos_token_ids=()).result().token_ids
    assert first.usage.encoded == 1
