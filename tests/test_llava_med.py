"""LLaVA-Med: golden figures, both generations' files, benchmarks, data from captions, recipes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_api import FakeAPI
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    TEXT,
    VISION,
    WIDTH,
    language_tensors,
    tower_tensors,
    vocabulary,
    write_tokenizer,
    write_tower,
)

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, load_processor, open_checkpoint
from llavakit.connectors.general import MLP, Pooling
from llavakit.conversation.turns import TextDelta
from llavakit.data.preparation import prepare
from llavakit.data.records import read_record
from llavakit.errors import CheckpointError, RecipeError, RecordError, UserError
from llavakit.evaluation.judges import Judge
from llavakit.evaluation.run import evaluate
from llavakit.evaluation.score import benchmark, score
from llavakit.generation.responder import Responder
from llavakit.media.image import load_image
from llavakit.proof.entries import turns_to_messages
from llavakit.proof.golden import find_cases, run_case
from llavakit.registry import CODECS, PLANNERS, TEMPLATES
from llavakit.synthesis.run import synthesize
from llavakit.system import get_system
from llavakit.systems.llava_med import chat_eval, dialogues, instruct, miniature, templates, vqa
from llavakit.systems.llava_med.captions import BRIEF, DETAILED
from llavakit.systems.llava_med.checkpoint import GREY, FirstLayout, MistralLayout
from llavakit.systems.llava_med.cost import cost
from llavakit.systems.llava_med.vqa_files import read_questions
from llavakit.training.build import build_meta, build_model
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.views.plan import MediaSize

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")

GOLDEN = Path(__file__).parent / "golden" / "llava-med"
SYSTEM = get_system("llava-med")
ADDED = ("[PAD]", "<im_patch>", "<im_start>", "<im_end>")


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


# Templates


def test_registered_templates_are_those_that_the_published_facts_make():
    for case, names in (
        (
            "prompt-templates-v1.0",
            {"simple": "llava_med_simple", "llava_v1": "llava_med_v1", "bair_v1": "llava_med_bair_v1"},
        ),
        ("prompt-templates-v1.5", {"vicuna_v1": "llava_med_1_5_vicuna_v1", "llava_v1": "llava_med_1_5_llava_v1"}),
    ):
        facts = json.loads((GOLDEN / case / "case.json").read_text())["config"]["templates"]
        turns = turns_to_messages([(0, " Why? "), (1, "So."), (0, "")])
        for name, registered in names.items():
            made = templates.conversation_template(name, facts[name])
            for opened in (False, True):
                own = TEMPLATES.get(registered)
                options = {"add_generation_prompt": opened}
                assert own.render(turns[: 3 - opened], **options) == made.render(turns[: 3 - opened], **options)


def test_messages_without_text_are_open_turns_everywhere():
    empty = turns_to_messages([(0, ""), (1, "a"), (0, "b")])
    simple = templates.hashes("x", "S")
    assert simple.render(empty)[0] == "S###Human:Assistant: a###Human: b###"
    stripped = templates.two_separators("x", "S", strips=True)
    assert stripped.render(empty)[0] == "S USER:ASSISTANT: a</s> USER: b"
    assert templates.bracketed("x", "", "<s>").render(empty)[0] == " a </s><s>[INST] b [/INST]"
    assert templates.marked("x", "S", ("U\n", "A\n"), "|").render(empty)[0] == "S|U\nA\na|U\nb|"


def test_a_style_that_does_not_exist_is_refused():
    facts = {"sep_style": "THREE", "system": "", "roles": ["A", "B"], "sep": "", "sep2": None}
    with pytest.raises(UserError, match="sep_style: must be SINGLE, TWO, LLAMA_2 or MPT, not 'THREE'"):
        templates.conversation_template("x", facts)
    spoken = facts | {"sep_style": "SINGLE", "preset_messages": [["C", "x"]]}
    with pytest.raises(UserError, match="the speaker is 'C', not 'A'"):
        templates.conversation_template("x", spoken)


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        (" Assistant: A lung.", "A lung."),
        ("Assistant:", ""),
        ("Assistants help.", "Assistants help."),
        ("Human: x", "x"),
        ("A lung. Assistant: b", "A lung. Assistant: b"),
        ("Ass", "Ass"),
        ("", ""),
    ],
)
def test_the_name_of_the_speaker_is_no_part_of_a_reply(reply, wanted):
    codec = CODECS.get("llava_med_role")()
    assert codec.parse(reply).content == wanted
    parser, found = codec.parser(), ""
    for letter in reply:
        found += "".join(event.text for event in parser.feed(letter))
    assert found + "".join(event.text for event in parser.finish()) == wanted


# v1.0: differences to a base model


def add_tokens(folder: Path) -> dict[str, int]:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    first = len(raw["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw["added_tokens"] += [{"id": first + n, "content": token, **flags} for n, token in enumerate(ADDED)]
    path.write_text(json.dumps(raw))
    return {token: first + n for n, token in enumerate(ADDED)}


def first_config(**fields) -> dict:
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **TEXT,
        "vocab_size": vocabulary() + len(ADDED),
        "max_sequence_length": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "mm_hidden_size": 16,
        "mm_use_im_start_end": True,
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14",
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        **fields,
    }


@pytest.fixture
def first(tmp_path):
    """A base model, the differences to it, the target's tensors and the encoder, small, under the true names."""
    generator = torch.Generator().manual_seed(0)
    base, delta = tmp_path / "llama-7b", tmp_path / "llava-med-7b-delta"
    for folder in (base, delta):
        folder.mkdir()
        write_tokenizer(folder)
    add_tokens(delta)
    below = {name: tensor.half() for name, tensor in language_tensors(generator, vocabulary()).items()}
    below["model.norm.weight"] = torch.rand(WIDTH, generator=generator).half() + 1
    target = {
        name: (tensor.float() + 0.02 * torch.randn(tensor.shape, generator=generator)).half()
        for name, tensor in below.items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        target[name] = torch.cat([target[name], torch.randn(len(ADDED), WIDTH, generator=generator).half()])
    target["model.mm_projector.weight"] = torch.randn(WIDTH, 16, generator=generator).half()
    target["model.mm_projector.bias"] = torch.randn(WIDTH, generator=generator).half()
    differences = {}
    for name, tensor in target.items():
        differences[name] = tensor.clone()
        if name in below:
            differences[name][: below[name].shape[0]] -= below[name]
    save_file(below, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocabulary(), **TEXT}))
    half = len(differences) // 2
    names, weight_map = list(differences), {}
    for number, own in enumerate((names[:half], names[half:]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: differences[name] for name in own}, delta / file)
        weight_map |= dict.fromkeys(own, file)
    (delta / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (delta / "config.json").write_text(json.dumps(first_config()))
    tower = write_tower(tmp_path / "tower", tower_tensors(generator))
    return base, delta, target, tower


def test_differences_open_beside_their_base(first):
    base, delta, target, tower = first
    with pytest.raises(CheckpointError, match="mm_hidden_size is 16, the encoder's features have 1024"):
        open_checkpoint(delta, base=base)  # the published name means CLIP's large encoder
    checkpoint = open_checkpoint(delta, base=base, vision_tower=tower)
    config = checkpoint.config
    assert (config.system, config.template) == ("llava-med", "llava_med_simple_unopened")
    assert (config.codec, config.connector["depth"]) == ("llava_med_role", 1)
    assert (config.bos_token_id, config.eos_token_id, config.text_config.eos_token_id) == (1, 2, 2)
    net = build(checkpoint)
    for name, tensor in target.items():
        if name.startswith("model.layers"):
            own = net.state_dict()[name.replace("model.", "model.language_model.", 1)]
            torch.testing.assert_close(own.float(), tensor.float(), atol=2e-3, rtol=0)
    assert torch.equal(net.model.multi_modal_projector.linear_1.weight, target["model.mm_projector.weight"])
    processor = load_processor(checkpoint, base)
    part = {"type": "image", "image": Image.new("RGB", (40, 20), "red")}
    asked = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    ids = processor.encode(asked, add_generation_prompt=True)["input_ids"]
    start, end = ids.index(vocabulary() + 2), ids.index(vocabulary() + 3)
    assert ids[start + 1 : end] == [processor.image_token_id] * 16
    text = processor.tokenizer.decode(ids[:start])
    assert text.endswith("###Human: What is it?\n")  # the picture follows the question
    assert processor.tokenizer.decode(ids[end + 1 :]).strip() == "###"  # the model writes who speaks
    chat = llavakit.load(delta, base=base, vision_tower=tower, dtype="float32")
    assert isinstance(chat.chat(asked, max_new_tokens=3), str)


def test_differences_are_converted_and_written_back_whole(first, tmp_path):
    base, delta, _, tower = first
    convert(delta, tmp_path / "own", to="llavakit", base=base, vision_tower=tower)
    convert(tmp_path / "own", tmp_path / "again", to="original")
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (raw["model_type"], raw["bos_token_id"], raw["eos_token_id"], raw["mm_use_im_start_end"]) == (
        "llava",
        0,
        1,
        True,
    )
    one, other = (build(open_checkpoint(tmp_path / name)).state_dict() for name in ("own", "again"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    written = set(load_file(tmp_path / "again" / "model.safetensors"))
    assert {"model.mm_projector.weight", "model.mm_projector.bias", "lm_head.weight"} <= written


def test_differences_are_written_and_give_the_model_back(first, tmp_path):
    base, delta, _, tower = first
    convert(delta, tmp_path / "own", to="llavakit", base=base, vision_tower=tower)
    convert(tmp_path / "own", tmp_path / "again", to="original", difference_to=base)
    written, below = load_file(tmp_path / "again" / "model.safetensors"), load_file(base / "model.safetensors")
    whole = open_checkpoint(tmp_path / "own").state
    grown, small = written["model.embed_tokens.weight"], below["model.embed_tokens.weight"]
    own = whole["model.language_model.embed_tokens.weight"]
    assert torch.equal(grown[: len(small)], own[: len(small)] - small)
    assert torch.equal(grown[len(small) :], own[len(small) :])
    with pytest.raises(CheckpointError, match="holds weight differences"):
        open_checkpoint(tmp_path / "again")
    restored = open_checkpoint(tmp_path / "again", base=base).state
    for name in whole:
        torch.testing.assert_close(restored[name].float(), whole[name].float(), atol=2e-3, rtol=0)
    with pytest.raises(UserError, match="weight differences are a form of --to original, not of --to hf"):
        convert(tmp_path / "own", tmp_path / "hf", to="hf", difference_to=base)
    more = load_file(base / "model.safetensors") | {"model.extra": torch.zeros(1)}
    save_file(more, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has 'model\.extra', which the model does not have"):
        convert(tmp_path / "own", tmp_path / "no", to="original", difference_to=base)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_aspect_ratio": "keep"}, "image_aspect_ratio is 'keep'; llavakit reads 'square', 'pad'"),
        ({"mm_hidden_size": 24}, "mm_hidden_size is 24"),
        ({"mm_unknown": 1}, "'mm_unknown': 1 is not understood"),
    ],
)
def test_files_of_the_first_generation_that_do_not_fit_are_one_line(first, fields, message):
    base, delta, _, tower = first
    (delta / "config.json").write_text(json.dumps(first_config(**fields)))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(delta, base=base, vision_tower=tower)
    assert "\n" not in str(caught.value)


# v1.5


@pytest.fixture
def mistral(tmp_path):
    """`microsoft/llava-med-v1.5-mistral-7b`'s files, small, under the true names."""
    generator = torch.Generator().manual_seed(1)
    folder = tmp_path / "llava-med-v1.5-mistral-7b"
    folder.mkdir()
    write_tokenizer(folder)
    state = language_tensors(generator, vocabulary())
    for n in range(TEXT["num_hidden_layers"]):
        for part in "kv":
            state[f"model.layers.{n}.self_attn.{part}_proj.weight"] = torch.randn(16, WIDTH, generator=generator) * 0.2
    for name, shape in (("0", (WIDTH, 16)), ("2", (WIDTH, WIDTH))):
        state[f"model.mm_projector.{name}.weight"] = torch.randn(shape, generator=generator) * 0.2
        state[f"model.mm_projector.{name}.bias"] = torch.randn(WIDTH, generator=generator)
    tower = tower_tensors(generator)
    state |= {f"model.vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in tower.items()}
    save_file(state, folder / "model.safetensors")
    raw = {
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        **TEXT,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": vocabulary(),
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 16,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": 2e-5,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(write_tower(tmp_path / "tower", tower_tensors(generator))),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, state


def test_the_encoder_in_the_files_is_the_one_that_is_used(mistral):
    folder, state = mistral
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.config.system, checkpoint.config.template) == ("llava-med", "mistral_instruct")
    assert checkpoint.config.text_config.num_key_value_heads == 2
    name = "encoder.layers.0.mlp.fc1.weight"
    stored = state[f"model.vision_tower.vision_tower.vision_model.{name}"]
    assert torch.equal(checkpoint.state[f"model.vision_tower.{name}"], stored)
    other = json.loads((folder / "config.json").read_text())["mm_vision_tower"]
    with pytest.raises(CheckpointError, match="holds an encoder of its own, which is not that of --vision-tower"):
        open_checkpoint(folder, vision_tower=other)


def test_grey_pictures_are_padded_with_grey(mistral, tmp_path):
    folder, _ = mistral
    chat = llavakit.load(folder)
    grey = Image.fromarray(np.full((8, 16), 200, np.uint8))
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "rgb.png")
    planner = PLANNERS.build(chat.config.media["image"]["views"])
    corner = {}
    for name in ("grey", "rgb"):
        image = load_image(tmp_path / f"{name}.png")
        corner[name] = planner.render(image, planner.plan(MediaSize(1, 8, 16)))[0].getpixel((0, 0))
    assert corner == {"grey": (GREY,) * 3, "rgb": (122, 116, 104)}
    with pytest.raises(UserError, match="grey_background: must be a value from 0 to 255"):
        PLANNERS.build({"type": "pad", "size": 8, "grey_background": 256})


def test_conversions_keep_the_model_and_say_what_transformers_does_not_have(mistral, tmp_path):
    folder, state = mistral
    convert(folder, tmp_path / "own", to="llavakit")
    convert(tmp_path / "own", tmp_path / "again", to="original")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(state)
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    assert open_checkpoint(tmp_path / "again").config.system == "llava-med"
    made = convert(folder, tmp_path / "hf", to="hf")
    assert any("pictures of one channel" in note for note in made["notes"])


def test_a_model_is_asked_and_scored_on_a_published_file(mistral, tmp_path):
    folder, _ = mistral
    Image.new("L", (20, 12), 90).save(tmp_path / "s1.jpg")
    gold = write(tmp_path / "test.json", CONVERTED)
    chat, quiet = llavakit.load(folder), Console(quiet=True)
    files = gold, tmp_path / "predictions.jsonl"
    found = evaluate(chat, "vqa_rad", *files, max_new_tokens=3, console=quiet)
    assert (found["asked"], found["metrics"]["open_count"], found["metrics"]["closed_count"]) == (2, 1, 1)
    assert evaluate(chat, "vqa_rad", *files, max_new_tokens=3, console=quiet)["asked"] == 0
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [row["question_id"] for row in rows] == ["s1", "s1#2"]


def test_tiled_mistral_files_are_another_systems(mistral):
    folder, _ = mistral
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[32, 16]]}
    (folder / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(folder).config.system == "llava-1.5"


# Recipes and costs


def test_published_shapes_counts_and_recipes():
    net = build_meta(load_recipe(SYSTEM.recipe))
    shapes = {name: tuple(tensor.shape) for name, tensor in FirstLayout().write_state(net.config, net.state_dict())}
    assert shapes["model.mm_projector.weight"] == (4096, 1024)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (32004, 4096)
    assert net.model.media.count("image", MediaSize(1, 600, 400)) == 256 + 2
    counted = {(row.group.partition(":")[0], row.name): row.value for row in cost().rows}
    assert counted["v1.0", "encoder, 24 layers"] == 162_023_964_672
    assert counted["v1.0", "connector"] == 4_198_400
    assert counted["v1.0", "connector on 256 tokens"] == 2_147_483_648
    assert counted["v1.0", "cache of a token, 16 bit"] == 524_288

    recipe = load_recipe(SYSTEM.recipe.with_name("mistral.yaml"))
    net = build_meta(recipe)
    shapes = {name: tuple(tensor.shape) for name, tensor in MistralLayout().write_state(net.config, net.state_dict())}
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["model.layers.31.mlp.gate_proj.weight"] == (14336, 4096)
    assert shapes["model.mm_projector.2.weight"] == (4096, 4096)
    assert sum(p.numel() for p in net.model.language_model.parameters()) + net.lm_head.weight.numel() == 7_241_732_096
    assert counted["v1.5", "language model"] == 7_241_732_096
    assert counted["v1.5", "encoder, 24 layers"] == 381_918_216_192
    assert counted["v1.5", "connector"] == 20_979_712
    assert counted["v1.5", "connector on 576 tokens"] == 24_159_191_040
    assert counted["v1.5", "prefill of 640 tokens"] == 9_316_052_500_480
    assert counted["v1.5", "cache of a token, 16 bit"] == 131_072
    assert counted["training", "steps on captions"] == 4_688
    assert counted["training", "steps on dialogues"] == 1_406


def tiny_recipe(folder: Path, **parts) -> dict:
    (folder / "tokenizer").mkdir(exist_ok=True)
    write_tokenizer(folder / "tokenizer")
    own = {
        "text_config": {"model_type": "llama", "vocab_size": vocabulary(), **TEXT},
        "vision_config": VISION,
        "connector": {"type": "mlp"},
        "media": {"image": {"views": {"type": "pad", "size": 16}, "arrange": {"type": "flat"}}},
        "tokenizer": str(folder / "tokenizer"),
        "start_at_mean": ["multi_modal_projector"],
    }
    stage = {"name": "align", "data": ["x"], "train": ["multi_modal_projector"], "learning_rate": 1e-3, "max_steps": 1}
    return {"parts": own | parts, "data": [{"name": "x", "path": "x.json"}], "stages": [stage], "output": str(folder)}


def test_every_visual_token_starts_as_the_mean_word(tmp_path):
    net, _ = build_model(parse_recipe(tiny_recipe(tmp_path)))
    mean = net.get_input_embeddings().weight[: vocabulary()].mean(0)
    for picture in torch.randn(2, 1, 3, 16, 16):
        tokens = net.get_image_features(picture).pooler_output[0]
        torch.testing.assert_close(tokens, mean.expand_as(tokens), atol=1e-6, rtol=1e-5)
    for change, message in (
        ({"start_at_mean": ["projector"]}, "parts.start_at_mean.0: the model has no connector 'projector'"),
        ({"connector": {"type": "resampler", "queries": 4, "heads": 2}}, "Resampler cannot start"),
        ({"init": {"multi_modal_projector": "somewhere"}}, "gets its weights from somewhere"),
    ):
        with pytest.raises((RecipeError, CheckpointError), match=message if "init" not in change else "somewhere"):
            build_model(parse_recipe(tiny_recipe(tmp_path, **change)))
    with pytest.raises(UserError, match="without a last layer that has a bias"):
        MLP(vision_width=4, hidden_size=4, bias=False).start_at(torch.zeros(4))
    pooled = Pooling(vision_width=4, hidden_size=6)
    pooled.start_at(torch.arange(6.0))
    assert torch.equal(pooled.project(torch.randn(3, 4)), torch.arange(6.0).expand(3, 6))


# Medical VQA


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


RAD = [
    {
        "qid": 1,
        "image_name": "a.jpg",
        "question": "Where?",
        "answer": "left lung",
        "answer_type": "OPEN",
        "phrase_type": "freeform",
    },
    {
        "qid": "2",
        "image_name": "b.jpg",
        "question": "Big?",
        "answer": "Yes",
        "answer_type": "CLOSED ",
        "phrase_type": "test_para",
    },
    {
        "qid": 3,
        "image_name": "b.jpg",
        "question": "How many?",
        "answer": 3,
        "answer_type": "OPEN",
        "phrase_type": "test_freeform",
    },
]
SLAKE = [
    {"qid": 0, "img_name": "x/s.jpg", "question": "Q?", "answer": "CT", "answer_type": "OPEN", "q_lang": "en"},
    {"qid": 1, "img_name": "x/s.jpg", "question": "?", "answer": "是", "answer_type": "CLOSED", "q_lang": "zh"},
]
PATH = [
    {"image": "test_1", "question": "Is it?", "answer": "yes"},
    {"image": "test_1", "question": "What?", "answer": "cells"},
]
CONVERTED = [
    {
        "id": "s1",
        "image": "s1.jpg",
        "answer_type": kind,
        name: [{"from": "human", "value": f"{text}\n<image>"}, {"from": "gpt", "value": answer}],
    }
    for name, kind, text, answer in (
        ("conversatons", "CLOSED", "Normal?", "no"),
        ("conversations", "OPEN", "Where?", "left lower lobe"),
    )
]


def test_all_published_forms_of_questions_are_read(tmp_path):
    rad = write(tmp_path / "VQA_RAD Dataset Public.json", RAD)
    assert [q.data["question_id"] for q in read_questions(rad, "test")] == ["2", "3"]
    assert [q.data["answer"] for q in read_questions(rad)] == ["left lung", "Yes", "3"]
    assert read_questions(rad)[1].data["answer_type"] == "CLOSED"
    slake = write(tmp_path / "slake.json", SLAKE)
    assert [q.data["image"] for q in read_questions(slake)] == ["imgs/x/s.jpg"]
    assert len(read_questions(slake, language="all")) == 2
    path = tmp_path / "test_qa.pkl"
    path.write_bytes(pickle.dumps(PATH))
    found = [q.data for q in read_questions(path)]
    assert [(q["question_id"], q["image"], q["answer_type"]) for q in found] == [
        ("test_1", "test_1.jpg", "CLOSED"),
        ("test_1#2", "test_1.jpg", "OPEN"),
    ]
    lxmert = [
        {
            "img_id": "test_2",
            "question_id": 7,
            "sent": "Is it?",
            "label": {"no": 0.3, "yes": 1},
            "answer_type": "yes/no",
        }
    ]
    assert read_questions(write(tmp_path / "p.json", lxmert))[0].data["answer"] == "yes"
    converted = [q.data for q in read_questions(write(tmp_path / "c.json", CONVERTED))]
    assert [(q["question_id"], q["text"]) for q in converted] == [("s1", "Normal?"), ("s1#2", "Where?")]


class Harm:
    def __reduce__(self):
        return print, ("executed",)


def test_pickles_are_read_without_running_anything(tmp_path, capsys):
    path = tmp_path / "qa.pkl"
    for content, message in ((Harm(), "holds an object of builtins.print"), ({}, "must be a pickled list, is dict")):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=message):
            read_questions(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no pickled list of plain values"):
        read_questions(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"qid": 1, "image_name": "a", "question": "q", "answer": None, "answer_type": "OPEN"}, ":1: answer: "),
        (
            {"qid": 1, "image_name": "a", "question": "q", "answer": "x", "answer_type": "HALF"},
            "must be OPEN or CLOSED",
        ),
        ({"id": 1, "conversations": [{"value": "q"}], "answer_type": "OPEN"}, "a question and its answer"),
        ({"id": 1, "conversations": [{"value": "q"}, {"value": "a"}]}, "answer_type: must be OPEN or CLOSED"),
        ({"image": 3}, "image: must be a string"),
    ],
)
def test_broken_questions_are_named_or_left_out(tmp_path, record, message):
    source = write(tmp_path / "q.json", [record, *RAD])
    with pytest.raises(RecordError, match=message) as caught:
        read_questions(source)
    assert "\n" not in str(caught.value)
    counts = prepare("medical_vqa", source, tmp_path / "out.json", on_bad_record="skip")
    assert counts["written"] == 3
    assert len(counts["left_out"]) == 1
    assert message.strip(": ")[:20] in counts["left_out"][0]


def test_questions_become_training_records(tmp_path):
    source = write(tmp_path / "rad.json", RAD)
    assert prepare("medical_vqa", source, tmp_path / "train.json", split="train")["written"] == 1
    record = json.loads((tmp_path / "train.json").read_text())[0]
    assert record["conversations"][0] == {"from": "human", "value": "<image>\nWhere?"}
    blind = write(tmp_path / "blind.json", [{key: value for key, value in CONVERTED[0].items() if key != "image"}])
    with pytest.raises(RecordError, match=r"blind\.json:1: image: is missing"):
        prepare("medical_vqa", blind, tmp_path / "o.json")
    with pytest.raises(UserError, match="has no phrase_type"):
        prepare("medical_vqa", write(tmp_path / "s.json", SLAKE), tmp_path / "o.json", split="test")


def test_repeated_ids_are_paired_in_order(tmp_path):
    gold = write(tmp_path / "gold.json", CONVERTED)
    predictions = write(
        tmp_path / "p.json",
        [{"question_id": "s1", "text": "It is abnormal."}, {"question_id": "s1", "text": "left lobe"}],
    )
    found = score("vqa_rad", predictions, gold)["metrics"]
    assert (found["closed"], found["open"]) == (100.0, pytest.approx(200 / 3))
    single = score("vqa_rad", predictions, gold, protocol="single")["metrics"]
    assert (single["closed"], single["open_accuracy"]) == (100.0, None)
    assert [q.question_id for q in benchmark("slake").questions(gold)] == ["s1", "s1#2"]
    short = write(tmp_path / "short.json", [{"question_id": "s1", "text": "no"}])
    with pytest.raises(RecordError, match="'s1#2' has no prediction"):
        score("vqa_rad", short, gold)
    assert score("vqa_rad", short, gold, missing="wrong")["metrics"]["open"] == 0.0
    with pytest.raises(UserError, match="protocol=both: must be batch or single"):
        score("vqa_rad", predictions, gold, protocol="both")
    with pytest.raises(UserError, match='a list of answers under "0"'):
        score("vqa_rad", predictions, gold, protocol="single", candidates=str(gold))


def test_properties_of_the_metrics():
    for text in ("left lung", "a b c", "12,000 cells"):
        assert vqa.overlap(f"there is {text} here", text)["recall"] == 1.0
        assert vqa.says(f"{text} and more", text)
    assert vqa.overlap("mass mass", "mass")["precision"] == 1.0
    assert not vqa.nearest_is("", "x", ["", "y"])


def test_released_records_are_read_with_their_spelling_and_numbers():
    turns = [{"from": "human", "value": "How many?\n<image>"}, {"from": "gpt", "value": 3}]
    record = read_record({"id": "s1", "image": "a.png", "conversatons": turns}, check_files=False)
    assert [message["role"] for message in record.messages] == ["user", "assistant"]
    assert record.messages[1]["content"] == [{"type": "text", "text": "3"}]
    with pytest.raises(RecordError, match=r"conversations\.1\.value: must be a string, not bool"):
        read_record({"image": "a.png", "conversatons": [turns[0], turns[1] | {"value": True}]}, check_files=False)


# The judged chat


QUESTIONS = [
    {
        "question_id": n,
        "image": "f.jpg",
        "text": "Where?\n<image>",
        "type": kind,
        "domain": domain,
        "fig_label": "Figure 1",
        "fig_caption": "CT.",
        "in_text_mention": ["One."],
        "gpt4_answer": "Left.",
    }
    for n, kind, domain in ((1, "conversation", {"mri": True, "ct_scan": True}), (2, "detail", {}))
]


class Scripted(Responder):
    """Answers by what it is shown."""

    def __init__(self, reply):
        super().__init__(name="scripted")
        self.reply, self.shown = reply, []

    def run(self, call):
        self.shown.append(call.messages[-1]["content"])
        yield TextDelta(text=self.reply(self.shown[-1]))


def test_a_judge_reviews_answers_and_groups_are_scored(tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    answers = write(tmp_path / "a.json", [{"question_id": 1, "text": "Right."}, {"question_id": 2, "text": "Wrong."}])
    judge = Scripted(lambda text: "8 4\nok" if "Wrong" not in text else "unclear")
    found = score("llava_med_chat", answers, questions, judge=Judge(judge))["metrics"]
    assert (found["relative_score"], found["count"], found["unreadable"]) == (50.0, 1, 1)
    assert set(found["by_group"]) == {"conversation", "mri"}
    shown = next(text for text in judge.shown if "Right" in text)
    assert "Figure Context:\n\t- ['One.']\n\n[Question]\nWhere?\n\n[Assistant 1]\nLeft." in shown
    reviews = tmp_path / "a.reviews.jsonl"
    assert score("llava_med_chat", reviews)["metrics"]["relative_score"] == 50.0
    with pytest.raises(UserError, match="name who reviews them"):
        score("llava_med_chat", answers, questions)
    unread = write(tmp_path / "r.json", [{"question_id": 1, "gpt_eval": "8  4"}])
    with pytest.raises(UserError, match="no review begins with a line of two scores"):
        score("llava_med_chat", unread)


def test_equal_scores_are_100_percent_and_means_are_of_ratios():
    rows = [("conversation", "mri", (float(n), float(n))) for n in (1, 5, 9)]
    assert chat_eval.summarise(rows)["overall"]["relative_score"] == 100.0
    rows = [(None, None, (10.0, 10.0)), (None, None, (1.0, 2.0))]
    assert chat_eval.summarise(rows)["overall"]["relative_score"] == 150.0
    assert chat_eval.chunks(6, 4) == [[0, 1, 2, 3, 4, 5]]
    assert [len(own) for own in chat_eval.chunks(7, 4)] == [4, 3]
    assert chat_eval.chunks(0, 4) == []


# Data from captions


def test_captions_ask_a_brief_or_a_detailed_question(tmp_path):
    figures = [
        {"pair_id": f"p{n}", "fig_caption": caption, "domain": {"mri": True}}
        for n, caption in enumerate(["short"] * 8 + ["word " * 31] * 8)
    ]
    source = write(tmp_path / "figures.json", [*figures, {"pair_id": "x", "fig_caption": " "}])
    with pytest.raises(RecordError, match=r"figures\.json:17: fig_caption: is ' '"):
        prepare("figure_captions", source, tmp_path / "out.json")
    counts = prepare("figure_captions", source, tmp_path / "out.json", on_bad_record="skip")
    assert (counts["written"], len(counts["left_out"])) == (16, 1)
    made = json.loads((tmp_path / "out.json").read_text())
    asked = [record["conversations"][0]["value"] for record in made]
    assert all(text.count("<image>") == 1 for text in asked)
    assert {text.startswith("<image>\n") for text in asked} == {True, False}
    stripped = [text.replace("<image>", "").strip() for text in asked]
    assert set(stripped[:8]) <= set(BRIEF)
    assert set(stripped[8:]) <= set(DETAILED)
    assert made[0]["image"] == "p0.jpg"


def test_cleaning_leaves_no_trace_of_the_caption():
    reply = (
        "User: a Assistant: The MRI shows a mass. User: b Assistant: According to the caption, Two Masses are seen. "
        "User: c Assistant: In the provided context, it is large. User: d Assistant: See the description."
    )
    made = instruct.formatted({"pair_id": "p", "domain": {"mri": True}}, reply)
    once = instruct.cleaned(made)
    answers = [turn["value"] for turn in once["conversations"][1::2]]
    assert answers == ["The MRI shows a mass.", "Two masses are seen.", "it is large."]
    assert instruct.cleaned(once) == once
    first = instruct.formatted({"pair_id": "p"}, "User: q Assistant: Sorry. User: r Assistant: A lung.")
    kept = instruct.cleaned(first)
    assert "<image>" not in kept["conversations"][0]["value"]
    assert instruct.with_image(kept)["conversations"][0]["value"] == "<image>\nr"
    assert instruct.formatted({"pair_id": "p"}, "no turns") is None
    assert instruct.cleaned(instruct.formatted({"pair_id": "p"}, "User: q Assistant: Sorry.")) is None
    record, _ = dialogues.dialogue_of(
        {"pair_id": "p"}, "User: <image> q Assistant: Sorry. User: r <image> Assistant: a"
    )
    assert sum(turn["value"].count("<image>") for turn in record["conversations"]) == 1
    known = instruct.phrases()
    assert "according to the provided context, " in known.lead_ins
    assert len(known.lead_ins) == len(set(known.lead_ins))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fig_caption": None}, "fig_caption: must be a text, not None"),
        ({"fig_label": 3}, "fig_label: must be a text, not 3"),
        ({"in_text_mention": "x"}, "in_text_mention: must be a list of sentences, not 'x'"),
        ({"in_text_mention": ["a", {"token": "b"}]}, r"in_text_mention\.1: must be a sentence or an object"),
    ],
)
def test_figures_that_cannot_be_shown_are_one_line(change, message):
    figure = {"fig_label": "Figure 1", "fig_caption": "CT.", "in_text_mention": None} | change
    with pytest.raises(UserError, match=message):
        instruct.request(figure)


def test_domains_take_turns():
    flags = [{name: True} for name in ["mri"] * 3 + ["gross", "x"]] + [{"mri": True, "chest_xray": True}]
    domains = [instruct.domain_of({"domain": own}) for own in flags]
    assert domains == ["mri", "mri", "mri", "gross", None, "chest_xray"]
    assert instruct.in_turn(domains) == [5, 0, 3, 1, 2, 4]
    assert instruct.in_turn(domains, 2) == [5, 0]
    assert instruct.domain_of({"domain": None}) is instruct.domain_of(3) is None


def figure(number: int, **fields) -> dict:
    own = {
        "pair_id": f"p{number}",
        "fig_label": "Figure 1",
        "fig_caption": f"Caption {number}.",
        "domain": {"mri": True},
    }
    return own | fields


REPLIES = {
    "Caption 0.": "User: What? Assistant: A mass. User: Where? Assistant: According to the caption, in the Liver.",
    "Caption 1.": "I cannot.",
    "Caption 2.": "User: What? Assistant: Sorry.",
    "Caption 3.": "User: Who? Assistant: Sorry. User: What? Assistant: A lung.",
}


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_teacher_writes_dialogues_and_the_same_call_goes_on(tmp_path):
    source = write(tmp_path / "figures.json", [figure(n) for n in range(4)])
    shots = write(tmp_path / "shots.json", [figure(9, conversations=[{"from": "human", "value": "Q"}])])
    options = {"examples": str(shots), "rounds": 2}
    out = tmp_path / "out.jsonl"
    with FakeAPI(lambda body: REPLIES[body["messages"][-1]["content"].splitlines()[1].partition(": ")[2]]) as server:
        teacher = f"{server.url}#m"
        found = synthesize("figure_dialogues", source, out, teacher=teacher, options=options)
        assert (found["records"], found["refused"], found["asked"]) == (2, 2, 5)  # one reply could not be read
        assert all(body["temperature"] == 0 for *_, body in server.bodies)
        assert "User: Q" in json.dumps(server.bodies[0][-1])
        assert synthesize("figure_dialogues", source, out, teacher=teacher, options=options) == found
        assert len(server.bodies) == 5
    first, last = lines(out)
    assert [turn["value"] for turn in first["conversations"][1::2]] == ["A mass.", "In the liver."]
    assert "<image>" in last["conversations"][0]["value"]
    assert "What?" in last["conversations"][0]["value"]
    assert last["provenance"] == {
        "fig_label": "Figure 1",
        "fig_caption": "Caption 3.",
        "mentions": True,
        "dropped_answers": 1,
        "rules": 1,
    }
    assert [(entry["id"], entry["reason"]) for entry in lines(tmp_path / "out.refused.jsonl")] == [
        ("p1", "the reply holds no question and answer"),
        ("p2", "all 1 answers speak of the text"),
    ]
    few = tmp_path / "few.jsonl"
    with FakeAPI(lambda body: REPLIES["Caption 0."]) as server:
        source = write(tmp_path / "two.json", [figure(0), figure(1), figure(2, domain={"chest_xray": True})])
        synthesize("figure_dialogues", source, few, teacher=f"{server.url}#m", options={"most": 2})
    assert [record["id"] for record in lines(few)] == ["p2", "p0"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fig_caption": " "}, "figures.json:2: fig_caption: is empty"),
        ({"pair_id": 3}, "figures.json:2: pair_id: must be a text, not 3"),
        ({"domain": ["mri"]}, "figures.json:2: domain: must be an object of flags"),
        ({"in_text_mention": [1]}, "figures.json:2: in_text_mention.0: must be a sentence"),
    ],
)
def test_broken_figures_are_named_before_anybody_is_asked(tmp_path, fields, message):
    source = write(tmp_path / "figures.json", [figure(0), figure(1, **fields)])
    with FakeAPI(lambda body: "never") as server, pytest.raises(UserError) as caught:
        synthesize("figure_dialogues", source, tmp_path / "out.jsonl", teacher=f"{server.url}#m")
    assert message in str(caught.value)
    assert not server.bodies


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 5}, "rounds must be 1 to 4, not 5"),
        ({"most": 0}, "most must be a number of figures, not 0"),
        ({"mentions": "False"}, "mentions must be true or false, not 'False'"),
        ({"turns": 2}, "has no option 'turns'"),
    ],
)
def test_options_of_dialogues_are_checked(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        synthesize("figure_dialogues", tmp_path / "none.json", tmp_path / "o.jsonl", teacher="t", options=options)
    broken = write(tmp_path / "shots.json", [figure(1)])
    with pytest.raises(RecordError, match=r"shots\.json:1: conversations: is missing"):
        dialogues.FigureDialogues(examples=str(broken))


# The miniature


def test_the_miniature_learns_what_its_texts_say():
    own = miniature.texts([("which side", "left"), ("describe", "plain tissue without lesion")])
    words = {number: word for word, number in miniature.IDS.items()}
    for row, wanted in enumerate(("left <end>", "plain tissue without lesion <end>")):
        learned = own.labels[row] != -100
        assert " ".join(words[int(number)] for number in own.ids[row][learned]) == wanted
        assert torch.equal(own.labels[row][learned], own.ids[row][learned])
    generator = torch.Generator().manual_seed(0)
    for make in (miniature.general, miniature.medical):
        for picture in (make(generator) for _ in range(20)):
            assert all(word in miniature.IDS for word in picture.caption.split())
            assert all(answer in miniature.ASKED[question.split()[1]] for question, answer in picture.questions)


def test_the_miniature_runs_every_arm():
    budget = {"encoder_steps": 2, "base_steps": 3, "align_steps": 2, "steps": 2, "held_out": 20, "drawn": 40}
    found = miniature.one_seed(0, **budget)
    assert found == miniature.one_seed(0, **budget)
    assert all(0 <= value <= 1 for value in found.values())
    verdict = miniature.run((0,), **budget)
    assert [comparison.threshold for comparison in verdict.comparisons] == [0.2, 0.2, 0.0]
    assert verdict.verdict == "inconclusive"  # one seed says nothing
