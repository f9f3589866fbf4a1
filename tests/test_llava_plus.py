"""LLaVA-Plus: golden figures, the three lines as a codec, the agent, training records, tools, checkpoints."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import open_checkpoint
from llavakit.conversation.turns import ToolCall, Turn
from llavakit.data.preparation import prepare
from llavakit.data.records import read_record
from llavakit.errors import RecordError, UserError
from llavakit.phantom.write import write_world
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.llava_plus.checkpoint import LlavaPlusLayout
from llavakit.systems.llava_plus.cost import cost
from llavakit.systems.llava_plus.dialogue import Dialogue
from llavakit.systems.llava_plus.grammar import ThreeLines, decode, split
from llavakit.systems.llava_plus.names import template_of
from llavakit.systems.llava_plus.pictures import boxes_in_pixels
from llavakit.systems.llava_plus.records import grounding_record, merged
from llavakit.systems.llava_plus.workers import both
from llavakit.tools import Artefacts
from llavakit.training.build import build_meta
from llavakit.training.recipe import load_recipe

GOLDEN = Path(__file__).parent / "golden" / "llava-plus"
DECLINED = {"dispatch"}


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == ("declined" if path.name in DECLINED else "passed"), report.reason


# The codec


def lines(actions="[]", thoughts="t", value="v"):
    return f'"thoughts🤔" {thoughts}\n"actions🚀" {actions}\n"value👉" {value}\n'


CALL = '[{"API_name": "ocr", "API_params": {"least": 0.5}}]'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "tools", "turn"),
    [
        (lines(), ["ocr"], Turn("v", "t")),
        (lines(CALL), ["ocr"], Turn("v", "t", [ToolCall("ocr", '{"least": 0.5}')])),
        (lines(CALL.replace('"', "'")), ["ocr"], Turn("v", "t", [ToolCall("ocr", '{"least": 0.5}')])),
        (lines(CALL), [], Turn(lines(CALL).strip())),
        (lines("[{"), ["ocr"], Turn(lines("[{").strip())),
        (lines('{"API_name": "ocr"}'), ["ocr"], Turn(lines('{"API_name": "ocr"}').strip())),
        (lines("__import__('os').system('x')"), ["ocr"], Turn(lines("__import__('os').system('x')").strip())),
        ("plain", ["ocr"], Turn("plain")),
        ('"thoughts🤔" only', ["ocr"], Turn('"thoughts🤔" only')),
        ("", ["ocr"], Turn("")),
        ("Well. " + lines(), ["ocr"], Turn("v", "t")),
    ],
)
def test_replies_are_read_alike_whole_and_in_pieces(text, tools, turn, size):
    parser = ThreeLines().parser(tools)
    events = [event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])]
    found = Turn.of([*events, *parser.finish()])
    assert (found.content, found.reasoning, found.calls) == (turn.content, turn.reasoning, turn.calls)


def test_a_value_without_a_call_is_streamed():
    parser = ThreeLines().parser(["ocr"])
    assert parser.feed('"thoughts🤔" t\n"actions🚀" []\n"val') == []
    assert [event.text for event in parser.feed('ue👉" It is')] == ["t", "It is"]
    assert [event.text for event in parser.feed(" red.")] == [" red."]
    assert parser.finish() == []


@pytest.mark.parametrize(
    "turn",
    [
        Turn("v", "t"),
        Turn("wait", "t", [ToolCall("ocr", '{"least": 0.5}')]),
        Turn("wait", "", [ToolCall("ocr", "{}")]),
        Turn('says "quoted" and é', "l1\nl2"),
    ],
)
def test_what_is_written_is_read_again(turn):
    found = ThreeLines().parse(ThreeLines().render(turn), ["ocr"])
    assert (found.content, found.reasoning, found.calls) == (turn.content, turn.reasoning, turn.calls)


def test_actions_are_json_and_never_evaluated():
    assert decode("[1]") == [1]
    assert decode("['a']") == ["a"]
    assert decode("open('/etc/passwd').read()") is None
    assert decode("[" * 100_000) is None
    assert split(lines(thoughts='"actions🚀" []', actions=CALL)).actions.strip() == CALL


def test_openai_messages_become_published_turns():
    call = {"id": "c1", "type": "function", "function": {"name": "grounding_dino", "arguments": '{"caption": "dog"}'}}
    found = ThreeLines().prepare(
        [
            {"role": "user", "content": "Where is the dog?"},
            {"role": "assistant", "content": None, "reasoning_content": "find", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": json.dumps({"boxes": [[0.125, 0.4, 0.5, 0.335]]})},
        ]
    )
    assert found[1]["content"] == (
        '"thoughts🤔" find\n"actions🚀" [{"API_name": "grounding_dino", "API_params": {"caption": "dog"}}]\n'
        '"value👉" I will use grounding_dino to help to answer the question. Please wait for a moment.'
    )
    assert found[2]["content"][0]["text"] == (
        "grounding_dino model outputs: {'boxes': [[0.12, 0.4, 0.5, 0.34]]}\n\n"
        "Please summarize the model outputs and answer my first question: Where is the dog?"
    )


# Checkpoints


@pytest.fixture
def published(tmp_path):
    """The golden network as a published folder."""
    config = json.loads((GOLDEN / "tiny_model" / "case.json").read_text())["config"]
    folder, encoder = tmp_path / "plus", tmp_path / "clip"
    folder.mkdir()
    encoder.mkdir()
    save_file(load_file(GOLDEN / "tiny_model" / "weights.safetensors"), folder / "model.safetensors")
    (encoder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **config["vision"]}))
    raw = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", **config["text"]}
    raw |= {"_name_or_path": "checkpoints/llava_plus_v0_7b", "mm_projector_type": "linear", "use_mm_proj": True}
    raw |= {"mm_vision_tower": str(encoder), "mm_hidden_size": 16, "mm_use_im_start_end": False}
    raw |= {"mm_use_im_patch_token": False, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    raw |= {"image_aspect_ratio": "square", "tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right"}
    raw |= {"tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, encoder


def test_the_published_layout_goes_there_and_back(published, tmp_path):
    folder, encoder = published
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.config.system, checkpoint.config.template) == ("llava-plus", "llava_v0")
    assert checkpoint.config.media["image"]["views"]["type"] == "square"
    convert(folder, tmp_path / "native", to="llavakit")
    convert(tmp_path / "native", tmp_path / "again", to="original")
    source, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.equal(written[name], source[name]) for name in source)
    back = open_checkpoint(tmp_path / "again", vision_tower=encoder)
    assert (back.config.system, back.config.media) == ("llava-plus", checkpoint.config.media)


def test_files_of_the_base_code_stay_those_of_llava():
    layout = LlavaPlusLayout()
    raw = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14", "vocab_size": 32001}
    assert layout.matches(raw, Path("."))
    for other in (
        {"vocab_size": 32000},
        {"mm_use_im_start_end": True},
        {"mm_projector_type": "mlp2x_gelu"},
        {"mm_patch_merge_type": "flat"},
    ):
        assert not layout.matches(raw | other, Path("."))
    assert layout.matches(raw | {"vocab_size": 32000, "_name_or_path": "runs/LLaVA-Plus-13b"}, Path("."))


def test_published_shapes_costs_and_recipe():
    net = build_meta(load_recipe(get_system("llava-plus").recipe))
    config = net.config
    assert (config.system, config.template, config.vision_config.image_size) == ("llava-plus", "llava_v0", 224)
    shapes = {name: tuple(tensor.shape) for name, tensor in LlavaPlusLayout().write_state(config, net.state_dict())}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (32001, 4096)
    assert shapes["model.mm_projector.weight"] == (4096, 1024)
    assert shapes["model.layers.31.mlp.down_proj.weight"] == (4096, 11008)
    decoder = sum(p.numel() for n, p in net.named_parameters() if "language_model" in n or n.startswith("lm_head"))
    assert decoder == 6_738_423_808
    counted = {(row.group, row.name): row.value for row in cost().rows}
    vision = "vision: CLIP ViT-L/14 at 224 px"
    assert counted[vision, "parameters"] == 303_179_776
    assert counted[vision, "24 layers"] == 162_023_964_672
    assert counted["linear projector", "one image"] == 2_147_483_648
    llama = "LLaMA-7B, logits at every position"
    assert counted[llama, "prefill of 256 + 80 tokens"] == 4_499_148_767_232
    assert counted[llama, "prefill of 256 + 400 tokens"] == 8_894_110_892_032


# What the published code does at the edges


def test_actions_between_other_blanks_are_read():
    assert decode("\u3000[]\u00a0\n") == []


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("MPT-7B", "vicuna_v1"),
        ("mpt-7b", "mpt_text"),
        ("LLaVA-v1-plain-tools", "v1_mmtag"),
        ("llava-tools", "llava_v0"),
    ],
)
def test_templates_go_by_the_spelling_of_names(name, template):
    assert template_of(name) == template


@pytest.mark.parametrize(
    ("found", "label"),
    [
        ({"phrases": ["a"]}, "a"),
        ({"logits": [0.5]}, "0.50"),
        ({"phrases": [""], "logits": [1]}, "1.00"),
        ({"phrases": ["a"], "logits": ["high"]}, "a"),
        ({}, ""),
    ],
)
def test_boxes_are_labelled_with_what_there_is(found, label):
    assert boxes_in_pixels({"boxes": [[0, 0, 1, 1]], **found}, (4, 2)).labels == [label]


def test_a_tool_of_two_passes_on_the_words_of_its_first_alone():
    replies = iter([{"tags": "a, b", "tags_chinese": "c", "caption": "no"}, {"boxes": []}])
    assert both("ram+grounding_dino", {}, lambda name, params: next(replies)) == {
        "boxes": [],
        "tags": "a, b",
        "tags_chinese": "c",
    }


def test_turns_keep_their_other_fields_and_may_lack_all_three():
    assert merged([{"from": "human", "value": "q", "id": 3}, {"from": "gpt", "weight": 1}]) == [
        {"from": "human", "value": "q", "id": 3},
        {"from": "gpt", "weight": 1, "value": ""},
    ]


def test_annotations_become_records_with_the_published_draws():
    item = {"question": "q", "grounding_dino_input": "x", "answer": "grounding_dino says"}
    item["grounding_dino_output"] = {"boxes": [[0.12345, 0, 1, 1]], "size": [1, 2]}
    draws = random.Random(0)
    records, dropped = zip(*(grounding_record(item, "t", draws) for _ in range(4)), strict=True)
    turns = [record["conversations"] for record in records]
    assert [own[0]["value"] for own in turns] == ["q\n<image>", "q\n<image>", "<image>\nq", "q\n<image>"]
    assert turns[0][2]["value"].startswith("grounding_dino output: {'boxes': [[0.12345, 0, 1, 1]]}\n")
    assert not any(dropped)
    assert grounding_record(item | {"answer": "As Grounding DINO says"}, "t", draws)[1]


class Tools:
    """Tools that find one thing."""

    def __contains__(self, name):
        return True

    def __call__(self, name, payload):
        return {"tags": "a"}


@pytest.mark.parametrize(
    ("outputs", "hidden", "debug"),
    [
        (["Sure! " + lines()], "Sure! " + lines().strip(), "Sure! " + lines().strip()),
        (['"thoughts🤔" only'], '"thinking....."', '"thoughts🤔" only'),
        ([lines("{}")], "v", "{small}v"),
        ([lines(CALL), "plain"], '"thinking."', "{small}{rule}{small}{rule}{small}"),
        ([lines(CALL), lines()], "v", "{small}{rule}{small}{rule}{small}\nv"),
    ],
)
def test_transcripts_are_those_of_the_published_page(outputs, hidden, debug):
    dialogue, texts = Dialogue(Tools()), iter(outputs)

    def ask(messages, changes):
        yield from ()
        return next(texts)

    list(dialogue.say(ask, "q"))
    assert [row.text for row in dialogue.transcript()] == ["q", hidden]
    shown = re.sub("<span.*?</span>", "{small}", dialogue.transcript(True)[1].text, flags=re.DOTALL)
    assert re.sub("<hr.*?>", "{rule}", shown) == debug


# Records


def test_published_records_become_llava_s(tmp_path):
    call = [{"API_name": "grounding_dino", "API_params": {"caption": "é"}}]
    record = {
        "unique_id": "7",
        "file_name": "a.jpg",
        "conversations": [
            {"from": "Human", "value": "Where?\n<image>"},
            {"from": "gpt", "thoughts": "t", "actions": call, "value": "wait"},
            {"from": "human", "value": "grounding_dino output: {}\n\nAnswer my first question: Where?\n<image>"},
            {"from": "gpt", "thoughts": "", "actions": [], "value": "There."},
        ],
    }
    (tmp_path / "in.json").write_text(json.dumps([record, {"conversations": [{"from": "human"}]}]))
    with pytest.raises(RecordError, match=r"conversations.0.value: is missing"):
        prepare("llava_plus", tmp_path / "in.json", tmp_path / "out.json")
    found = prepare("llava_plus", tmp_path / "in.json", tmp_path / "out.json", on_bad_record="skip")
    assert (found["records"], len(found["left_out"])) == (1, 1)
    (made,) = json.loads((tmp_path / "out.json").read_text())
    values = [turn["value"] for turn in made["conversations"]]
    assert values[0] == "<image>\nWhere?"
    assert values[1] == (
        '"thoughts🤔" t\n"actions🚀" [{"API_name": "grounding_dino", "API_params": {"caption": "\\u00e9"}}]\n'
        '"value👉" wait\n'
    )
    assert "".join(values).count("<image>") == 1
    assert values[3] == '"thoughts🤔" \n"actions🚀" []\n"value👉" There.\n'
    read = read_record(made, check_files=False)
    assert [message["role"] for message in read.messages] == ["user", "assistant"] * 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_world("scene", folder, n=12, seed=0, size=96, formats="sentence", progress=False)
    return folder


@pytest.mark.parametrize("mode", ["fly", "all"])
def test_scenes_become_records_with_what_the_real_skills_find(scenes, tmp_path, mode):
    pytest.importorskip("cv2")
    pytest.importorskip("rapidocr_onnxruntime")
    found = prepare("llava_plus_scenes", scenes, tmp_path / "own.json", mode=mode, read=False)
    records = json.loads((tmp_path / "own.json").read_text())
    assert found["records"] == len(records) > 5
    assert (found["calls"] > 0) == (mode == "fly")
    turns = [turn for record in records for turn in record["conversations"]]
    answers = [turn for turn in turns if turn["from"] == "gpt"]
    for turn in answers:
        assert ThreeLines().parse(ThreeLines().render(Turn(turn["value"], turn["thoughts"])), []).content
    if mode == "fly":
        called = [turn["actions"][0] for turn in answers if turn["actions"]]
        assert {call["API_name"] for call in called} == {"detect_shapes"}
        assert len(called) == found["calls"]
    else:
        assert all(turn["actions"] == [] for turn in answers)
        assert all("detect_shapes model outputs: {'boxes'" in r["conversations"][0]["value"] for r in records)
    prepare("llava_plus", tmp_path / "own.json", tmp_path / "train.json")
    for record in json.loads((tmp_path / "train.json").read_text()):
        read_record(record, str(scenes / "x.json"))


def test_mistakes_in_preparing_scenes_are_named(scenes, tmp_path):
    with pytest.raises(UserError, match="mode"):
        prepare("llava_plus_scenes", scenes, tmp_path / "x.json", mode="some")
    (tmp_path / "bad.json").write_text('[{"conversations": []}]')
    with pytest.raises(RecordError, match="beside its image"):
        prepare("llava_plus_scenes", tmp_path / "bad.json", tmp_path / "x.json")


# The miniature


def test_the_miniature_writes_real_calls_and_runs_them():
    pytest.importorskip("cv2")
    from llavakit.systems.llava_plus import miniature

    sight = miniature.sights(0, 1)[0]
    asked = miniature.question(sight, "where", np.random.default_rng(0))
    (_, written), (told, answer) = miniature.dialogue(sight, asked, "fly")
    text = miniature.said(written)
    assert decode(split(text).actions) == [{"API_name": "detect_shapes", "API_params": {"caption": asked.subject}}]
    found = miniature.tools_for(sight).call("detect_shapes", {"caption": asked.subject}, Artefacts(sight.image))
    assert miniature.found_by(found.data) == {asked.subject: told[-1]}
    assert split(miniature.said(answer)).value.strip() == f"{asked.subject} {told[-1]}"


def test_a_short_run_of_the_miniature_gives_a_verdict():
    pytest.importorskip("cv2")
    verdict = get_system("llava-plus").load("miniature")(seeds=(0, 1), steps=6, questions=8)
    assert [len(c.gains) for c in verdict.comparisons] == [2, 2, 2]
    assert "needless" in verdict.notes
