"""Surgical-LLaVA: golden figures, pooling, files, templates, questions, judges, records."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import TEXT, WIDTH, language_tensors, tower_tensors, vocabulary, write_tokenizer, write_tower

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, load_processor, open_checkpoint
from llavakit.connectors.base import Features
from llavakit.conversation.template import get_template
from llavakit.conversation.turns import TextDelta
from llavakit.data.preparation import prepare
from llavakit.data.records import Record
from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks import five_aspects
from llavakit.evaluation.judges import Judge
from llavakit.evaluation.metrics.classes import ClassAnswers, macro_scores
from llavakit.evaluation.score import benchmark, score
from llavakit.generation.responder import Responder
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.visuals import gather_media
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.surgical_llava import miniature
from llavakit.systems.surgical_llava.checkpoint import PUBLISHED, VideoChatGPT
from llavakit.systems.surgical_llava.connector import SpatioTemporal, pool
from llavakit.systems.surgical_llava.cost import cost, figures
from llavakit.training.build import build_meta
from llavakit.training.features import FeatureCache
from llavakit.training.recipe import load_recipe
from llavakit.views.plan import MediaSize

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")

ORDER = "frames_then_patches"
GOLDEN = Path(__file__).parent / "golden" / "surgical-llava"


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


# Pooling


def connector(**options) -> SpatioTemporal:
    return SpatioTemporal(vision_width=6, hidden_size=8, **options)


def features(*clips: torch.Tensor) -> Features:
    flat = [clip.flatten(0, 1) for clip in clips]
    grids = [(1, 1, clip.shape[1]) for clip in clips for _ in clip]
    return Features(torch.cat(flat), grids, [number for number, clip in enumerate(clips) for _ in clip])


def test_pooling_keeps_its_promises():
    torch.manual_seed(0)
    clip = torch.randn(7, 5, 6)
    pooled = pool(clip, 10)
    assert pooled.shape == (15, 6)
    assert not pooled[7:10].any()
    order = torch.randperm(7)
    other = pool(clip[order], 10)
    torch.testing.assert_close(other[:7], pooled[:7][order])
    torch.testing.assert_close(other[10:], pooled[10:])
    still = pool(clip[:1].expand(4, 5, 6), None)
    assert still.shape == (9, 6)
    torch.testing.assert_close(still[:4], still[:1].expand(4, 6))
    torch.testing.assert_close(still[4:], clip[0])
    shifted = pool(clip + 3, 10) - pooled
    assert torch.allclose(shifted[:7], torch.tensor(3.0))
    assert not shifted[7:10].any()
    assert len(pool(torch.randn(12, 5, 6), 10)) == 17  # never cut
    assert pool(clip.half(), None).dtype == torch.float32
    assert pool(clip.double(), None).dtype == torch.float64


def test_free_slots_are_the_bias_and_batches_equal_single_clips():
    torch.manual_seed(0)
    net, clips = connector(slots=9, precision=None), [torch.randn(3, 4, 6), torch.randn(9, 4, 6), torch.randn(1, 4, 6)]
    with torch.no_grad():
        together = net(features(*clips), [None] * 3)
        assert together.grids == [(9, 1, 1), (1, 1, 4)] * 3
        assert together.media_index == [0, 0, 1, 1, 2, 2]
        for number, clip in enumerate(clips):
            alone = net(features(clip), [None]).values
            torch.testing.assert_close(together.values[13 * number : 13 * (number + 1)], alone)
        bias = net.linear_1.bias.expand(8, 8)
        torch.testing.assert_close(together.values[27:35], bias)
        rounded = connector(slots=9)
        rounded.load_state_dict(net.state_dict())
        wanted = net.project(pool(clips[0], 9).half().float())
        torch.testing.assert_close(rounded(features(clips[0]), [None]).values, wanted)


def model(**options) -> LlavakitForConditionalGeneration:
    fields = tiny.config().to_dict()
    view = {"type": "squash", "size": tiny.SIZE}
    media = {"image": {"views": view}, "video": {"views": {"type": "frames", "frame": view}}}
    fields |= {"connector": {"type": "spatio_temporal", **options}, "media": media}
    fields["media"]["volume"] = {"views": {"type": "volume_slices", "size": tiny.SIZE, "slices": 5}}
    torch.manual_seed(0)
    return LlavakitForConditionalGeneration(LlavakitConfig.from_dict(fields)).eval()


@pytest.mark.parametrize("slots", [100, 8, None])
def test_the_number_of_tokens_does_not_depend_on_the_length(slots):
    media = model(slots=slots).model.media
    patches = media.count("image", MediaSize(1, 30, 40)) - (slots or 1)
    for frames in (1, 2, 8):
        assert media.count("video", MediaSize(frames, 30, 40)) == (slots or frames) + patches
    assert media.count("volume", MediaSize(64, 30, 40)) == (slots or 5) + patches
    if slots == 8:
        with pytest.raises(UserError, match="has 8 slots, the video has 9 frames; sample fewer"):
            media.count("video", MediaSize(9, 30, 40))


def test_frames_slices_and_pictures_train_and_tiles_are_refused():
    net = model(slots=6)
    media = net.model.media
    sizes = [MediaSize(3, 20, 20), MediaSize(1, 20, 20), MediaSize(9, 20, 20)]
    kinds = ["video", "image", "volume"]
    views = torch.randn(3 + 1 + 5, 3, tiny.SIZE, tiny.SIZE)
    count = media.count("image", sizes[1])
    ids = torch.tensor([[1, *[tiny.TOKEN] * 3 * count, 5]])
    out = net(
        input_ids=ids,
        labels=ids.masked_fill(ids == tiny.TOKEN, -100),
        pixel_values=views,
        visual_sizes=torch.tensor(sizes),
        visual_modalities=torch.tensor([["image", "video", "volume"].index(kind) for kind in kinds]),
    )
    out.loss.backward()
    assert net.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    fields = net.config.to_dict()
    fields["media"]["image"]["views"] = {"type": "anyres", "size": tiny.SIZE, "pinpoints": [[2 * tiny.SIZE] * 2]}
    tiled = LlavakitForConditionalGeneration(LlavakitConfig.from_dict(fields))
    with pytest.raises(UserError, match="one view of every frame"):
        tiled.model.media.count("image", MediaSize(1, 80, 80))


@pytest.mark.parametrize("options", [{"slots": 0}, {"slots": True}, {"slots": "9"}, {"precision": "int8"}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        connector(**options)


# Files


def published(root: Path, extra: int = 0, **fields) -> Path:
    """A folder of the type VideoChatGPT with its encoder's folder beside it.

    Args:
        extra: Rows of the vocabulary beyond those of the language model.
    """
    generator = torch.Generator().manual_seed(0)
    folder, rows = root / "video", vocabulary() + extra
    folder.mkdir()
    tensors = language_tensors(generator, rows)
    shapes = {"model.mm_projector.weight": (WIDTH, 16), "model.mm_projector.bias": (WIDTH,)}
    tensors |= {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    raw = {**TEXT, "model_type": "VideoChatGPT", "architectures": ["VideoChatGPTLlamaForCausalLM"], "vocab_size": rows}
    raw |= {"mm_vision_tower": str(root / "encoder"), "use_mm_proj": True, "mm_hidden_size": 16}
    raw |= {"mm_use_vid_start_end": True, "tune_mm_mlp_adapter": True, "sep_video_conv_front": False, **fields}
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder)
    write_tower(root / "encoder", tower_tensors(generator))
    return folder


def test_published_layout_round_trips(tmp_path):
    folder, encoder = published(tmp_path, extra=3), tmp_path / "encoder"
    checkpoint = open_checkpoint(folder)
    config, rows = checkpoint.config, vocabulary()
    assert (config.system, config.template, config.image_token_id) == ("surgical-llava", "video_chatgpt_v1", rows)
    arrange = {"type": "wrapped", "before": [rows + 1], "after": [rows + 2]}
    assert config.media["video"]["arrange"] == config.media["image"]["arrange"] == arrange
    assert config.connector == {"type": "spatio_temporal", "slots": 100, "precision": "float16", "depth": 1}
    convert(folder, tmp_path / "native", to="llavakit")
    convert(tmp_path / "native", tmp_path / "again", to="original")
    source, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert {name for name in written if "vision_tower" not in name} == set(source)
    assert all(torch.equal(written[name], source[name]) for name in source)
    back = open_checkpoint(tmp_path / "again", vision_tower=encoder)
    assert (back.config.media, back.config.connector) == (config.media, config.connector)
    one, other = (dict(build(c).named_parameters()) for c in (checkpoint, back))
    assert all(torch.equal(one[name], other[name]) for name in one)
    processor = load_processor(checkpoint)
    assert processor.sampling == {"type": "midpoints", "frames": 100}
    clip = [Image.new("RGB", (20, 30))] * 120
    message = {"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What?"}]}
    ids = processor.encode([message], add_generation_prompt=True)["input_ids"]
    assert ids.count(processor.image_token_id) == 116  # 100 frames and 4 x 4 patches
    run = ids.index(processor.image_token_id)
    assert (ids[run - 1], ids[run + 116]) == (rows + 1, rows + 2)


def test_projector_and_embeddings_alone_are_opened_on_the_language_model(tmp_path):
    whole = published(tmp_path, extra=3)
    tensors = load_file(whole / "model.safetensors")
    base, alone, rows = tmp_path / "base", tmp_path / "alone", vocabulary()
    base.mkdir()
    alone.mkdir()
    grown = ("model.embed_tokens.weight", "lm_head.weight")
    text = {name: tensor[:rows] if name in grown else tensor for name, tensor in tensors.items() if "mm_" not in name}
    save_file({name: tensor.contiguous() for name, tensor in text.items()}, base / "model.safetensors")
    raw = {**TEXT, "model_type": "llava", "vocab_size": rows, "mm_use_im_start_end": True, "mm_hidden_size": 16}
    (base / "config.json").write_text(json.dumps(raw))
    write_tokenizer(base)
    trained = ("model.mm_projector.weight", "model.mm_projector.bias", "model.embed_tokens.weight")
    torch.save({name: tensors[name] for name in trained}, alone / "video_chatgpt-7B.bin")
    with pytest.raises(UserError, match="name the folder of the language model with --base"):
        open_checkpoint(alone)
    with pytest.raises(UserError, match="mm_hidden_size is 1024, the encoder's features have 16"):
        open_checkpoint(alone, base=base, vision_tower=tmp_path / "encoder")
    with patch.dict(PUBLISHED, {"mm_hidden_size": 16}):
        checkpoint = open_checkpoint(alone, base=base, vision_tower=tmp_path / "encoder")
    net = build(checkpoint)
    assert torch.equal(net.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])
    assert torch.equal(net.lm_head.weight[:rows], tensors["lm_head.weight"][:rows])
    torch.testing.assert_close(net.lm_head.weight[rows:], tensors["lm_head.weight"][:rows].mean(0).expand(3, -1))
    assert checkpoint.config.media["video"]["arrange"]["before"] == [rows + 1]
    assert load_processor(checkpoint, base).image_token_id == rows


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type is 'mlp2x_gelu'; llavakit reads 'linear'"),
        ({"vid_start_token": 7}, "vid_patch_token is None, it should be the id of a token"),
        ({"spatio_temporal_pooling": {"order": "patches_then_frames"}}, "order is 'patches_then_frames'"),
        ({"spatio_temporal_pooling": {"slots": 9}}, "'slots': 9 is not understood"),
        ({"temporal_tokens": 50}, "'temporal_tokens': 50 is not understood"),
    ],
)
def test_what_the_files_say_is_read_or_refused(tmp_path, fields, problem):
    with pytest.raises(UserError, match=problem):
        open_checkpoint(published(tmp_path, **fields))


def test_clips_without_marks_and_other_pooling(tmp_path):
    pooling = {"temporal_slots": 8, "precision": None}
    own = {"mm_use_vid_start_end": False, "vid_patch_token": 5, "spatio_temporal_pooling": pooling}
    config = open_checkpoint(published(tmp_path, **own)).config
    assert (config.image_token_id, config.media["video"]["arrange"]) == (5, {"type": "flat"})
    assert (config.connector["slots"], config.connector["precision"]) == (8, None)
    again = VideoChatGPT().write_config(config)
    assert {key: again[key] for key in own} == own | {"spatio_temporal_pooling": pooling | {"order": ORDER}}


def test_published_shapes_and_recipe():
    net = build_meta(load_recipe(get_system("surgical-llava").recipe))
    assert sum(p.numel() for p in net.model.multi_modal_projector.parameters()) == 4_198_400
    for frames in (1, 3, 100):
        assert net.model.media.count("video", MediaSize(frames, 480, 854)) == 356 + 2
    shapes = {name: tuple(t.shape) for name, t in VideoChatGPT().write_state(net.config, net.state_dict())}
    assert shapes["model.mm_projector.weight"] == (4096, 1024)
    assert shapes["model.mm_projector.bias"] == (4096,)


def test_the_cache_of_features_keeps_averages_alone(tmp_path):
    checkpoint = open_checkpoint(published(tmp_path, extra=3))
    net, processor = build(checkpoint), load_processor(checkpoint)
    rng = np.random.default_rng(0)
    clips = [[Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)) for _ in range(n)] for n in (5, 130, 1)]
    messages = [[{"role": "user", "content": [{"type": "video", "video": clip}]}] for clip in clips]
    records = [Record(own, "clips.jsonl", number, {}) for number, own in enumerate(messages, 1)]
    cache = FeatureCache(tmp_path / "cache", net, processor, "float32")
    assert cache.fill(records) == 3
    kept = [cache(own) for own in messages]
    assert [[len(tensor) for tensor in own] for own in kept] == [[5, 16], [100, 16], [1, 16]]
    assert cache.data.stat().st_size == sum(tensor.numel() * 4 for own in kept for tensor in own)
    samples = [processor.encode(own, add_generation_prompt=True) for own in messages]
    sizes = torch.tensor([sample["visual_sizes"][0] for sample in samples])
    kinds = torch.tensor([sample["visual_modalities"][0] for sample in samples])
    views = torch.stack([view for sample in samples for view in sample["pixel_values"]])
    with torch.no_grad():
        wanted = net.model.get_image_features(views, visual_sizes=sizes, visual_modalities=kinds).pooler_output
        names, plans = net.model.plan_media((), sizes, kinds)
        flat = [tensor for own in kept for tensor in own]
        found, _ = net.model.connect(gather_media(net.model.media, names, plans, flat, reduced=True))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # rounded to float16 on the way
    net.config.connector["slots"] = 8
    assert len(FeatureCache(tmp_path / "cache", net, processor, "float32")) == 0  # another pooling


# Templates


def test_clips_follow_the_question_in_prompts_and_stay_in_records():
    clip, text = {"type": "video"}, {"type": "text", "text": " What is done? "}
    asked = [{"role": "user", "content": [clip, text]}]
    rendered, _ = get_template("video_chatgpt_v1").render(asked, add_generation_prompt=True)
    assert rendered.endswith("video. USER:  What is done? \n<image> ASSISTANT:")
    record = [*asked, {"role": "assistant", "content": [{"type": "text", "text": "Cutting."}]}]
    kept, spans = get_template("vicuna_v1_1").render(record, training=True)
    assert kept.endswith("USER: <image> What is done?  ASSISTANT: Cutting.</s>")
    assert [kept[slice(*span)] for span in spans] == [" Cutting.</s>"]
    front, _ = get_template("vicuna_v1_1_front").render(record, training=True)
    assert front.endswith("USER: <image> USER: What is done? ASSISTANT: Cutting.</s>")
    default, _ = get_template("video_chatgpt_default").render(asked, add_generation_prompt=True)
    assert default.endswith("naturally.\n###Human:  What is done? \n<image>###Assistant:")


# Questions with classes


def test_free_text_becomes_the_longest_class_that_it_names():
    classes = ClassAnswers(["Grasping", "Tissue_Manipulation", "left-top", "no", "1", "11", "Vesículas_Seminales"])
    expected = {"grasping.": 0, "It is tissue manipulation, no?": 1, "LEFT TOP": 2, "The answer is no": 3, "11": 5}
    expected |= {"nothing": None, "": None, "1 of 1": 4, "Vesi\u0301culas-seminales!": 6, "not known": None}
    assert {text: classes(text) for text in expected} == expected
    assert ClassAnswers(["left", "down"])("left or down") is None
    with pytest.raises(UserError, match="two of them read 'a b'"):
        ClassAnswers(["a-b", "A_b"])


def test_invalid_answers_are_wrong_and_no_class():
    found = macro_scores([0, 0, 1, 2], [0, None, 1, 1])
    assert found == pytest.approx(
        {
            "accuracy": 0.5,
            "precision": (1 + 0.5 + 1) / 3,
            "recall": (0.5 + 1 + 0) / 3,
            "fscore": (2 / 3 + 2 / 3 + 0) / 3,
        }
    )
    assert macro_scores([0], [1], zero_division=0)["recall"] == 0
    with pytest.raises(UserError, match="at least one"):
        macro_scores([], [])


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def data_sets(tmp_path):
    """The three data sets in their published folders."""
    write(
        tmp_path / "endovis18_vqa/seq_5/vqa/Classification/frame000_QA.txt",
        "what is the organ?|kidney\n\nwhere?|left-top",
    )
    write(tmp_path / "endovis18_vqa/seq_2/vqa/Classification/frame001_QA.txt", "state?|Idle\n")
    for frame in (100, 150):
        write(tmp_path / f"cholec80_vqa/Classification/5/{frame}_QA.txt", "phase?|preparation\ntools?|1\n")
    write(
        tmp_path / "cholec80_vqa/Sentence/5/100_QA.txt",
        "phase?|the phase is preparation\nused?|a grasper-like tool is used\n",
    )
    write(tmp_path / "psi_ava_vqa/Val/C1_location.txt", "CASE001/00001.jpg|where?|top left\n")
    write(tmp_path / "psi_ava_vqa/Val/C2_action.txt", "CASE001/00001.jpg|what?|['Hold']\n")
    write(tmp_path / "psi_ava_vqa/Val/C4_step.txt", "CASE001/00001.jpg|step?|Succion\n")
    return tmp_path


def answers(path: Path, texts: dict[str, str]) -> Path:
    return write(path, "".join(json.dumps({"question_id": name, "text": text}) + "\n" for name, text in texts.items()))


@pytest.mark.parametrize(
    ("task", "options", "pictures", "replies", "expected"),
    [
        (
            "endovis18_vqa",
            {},
            ["seq_5/left_frames/frame000.png"] * 2,
            ["the kidney", "at the right"],
            {"accuracy": 50, "invalid": 1, "invalid_rate": 50, "precision": 100, "recall": 50},
        ),
        ("endovis18_vqa", {"split": "train"}, ["seq_2/left_frames/frame001.png"], ["idle"], {"fscore": 100}),
        ("cholec80_vqa", {"every": 100}, ["cropped_image/5/100.png"] * 2, ["preparation", "2"], {"accuracy": 50}),
        (
            "cholec80_vqa",
            {"form": "Sentence"},
            ["cropped_image/5/100.png"] * 2,
            ["The phase is preparation", "a grasper - like tool is used"],
            {"bleu_1": 100, "bleu_4": 100, "cider": 10.0},
        ),
        ("psi_ava_vqa", {}, ["keyframes/CASE001/00001.jpg"] * 2, ["top left", "Succion"], {"accuracy": 100}),
    ],
)
def test_published_folders_are_asked_and_scored(data_sets, task, options, pictures, replies, expected):
    folder = data_sets / task
    asked = benchmark(task).questions(folder, **options)
    assert [question.media[0]["image"] for question in asked] == [str(folder / picture) for picture in pictures]
    file = answers(data_sets / "answers.jsonl", {q.question_id: text for q, text in zip(asked, replies, strict=True)})
    metrics = score(task, file, folder, **options)["metrics"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("what is it?", r"a_QA.txt:2: \(line\): is 'what is it\?', it should be question\|answer"),
        ("a|b|c", r"a_QA.txt:2: \(line\)"),
        ("where?| ", "a_QA.txt:2: answer: is empty"),
    ],
)
def test_lines_that_do_not_parse_are_named(tmp_path, line, problem):
    write(tmp_path / "seq_1/vqa/Classification/a_QA.txt", f"organ?|kidney\n{line}\n")
    with pytest.raises(RecordError, match=problem):
        benchmark("endovis18_vqa").questions(tmp_path)


def test_answers_outside_the_classes_and_empty_folders_are_named(tmp_path):
    write(tmp_path / "seq_1/vqa/Classification/a_QA.txt", "organ?|spleen\n")
    asked = benchmark("endovis18_vqa").questions(tmp_path, choices=True)
    assert asked[0].text.startswith("organ?\nAnswer with one of: kidney, Idle")
    file = answers(tmp_path / "answers.jsonl", {asked[0].question_id: "kidney"})
    with pytest.raises(RecordError, match=r"a_QA\.txt:1: answer: is 'spleen', which is no class of EndoVis-18-VQA"):
        score("endovis18_vqa", file, tmp_path)
    with pytest.raises(UserError, match=r"holds no text file of the split 'train' \(Classification\)"):
        benchmark("endovis18_vqa").questions(tmp_path, split="train")
    with pytest.raises(UserError, match="split=test: must be train or val"):
        benchmark("endovis18_vqa").questions(tmp_path, split="test")


# The five aspects


class Scripted(Responder):
    """A judge that replies by rule."""

    def __init__(self, rule) -> None:
        super().__init__(name="scripted")
        self.rule, self.told = rule, []

    def run(self, call):
        self.told.append(call.messages[-1]["content"])
        yield TextDelta(text=self.rule(call.messages[-1]["content"]))


@pytest.mark.parametrize("aspect", ["3_context", "5_consistency"])
def test_a_golden_case_may_name_some_of_the_aspects(tmp_path, aspect):
    source = GOLDEN / "five_aspect_judge"
    case, outputs = (json.loads((source / name).read_text()) for name in ("case.json", "outputs.json"))
    case["config"]["aspects"] = [aspect]
    write(tmp_path / "case.json", json.dumps(case))
    write(tmp_path / "outputs.json", json.dumps({aspect: outputs[aspect]}))
    write(tmp_path / "inputs.json", (source / "inputs.json").read_text())
    report = run_case(tmp_path, [GOLDEN])
    assert report.status == "passed", report.reason


def test_judges_of_five_aspects(tmp_path):
    items = [{"video_name": "v", "Q": f"q{n}", "A": "a"} for n in range(3)]
    gold = write(tmp_path / "generic.json", json.dumps(items))
    for name in ("v.mp4", "w.avi"):
        write(tmp_path / name, "")
    asked = benchmark("five_aspects").questions(gold)
    assert [question.question_id for question in asked] == ["v_0", "v_1", "v_2"]
    assert asked[0].media == ({"type": "video", "video": str(tmp_path / "v.mp4")},)
    file = answers(tmp_path / "answers.jsonl", {question.question_id: "p" for question in asked})
    replies = {"q0": "{'score': 4.9}", "q1": "{''score': 4.8}", "q2": "{'score': '2'}"}
    judge = Judge(Scripted(lambda text: next(reply for q, reply in replies.items() if f"Question: {q}" in text)))
    found = score("five_aspects", file, gold, judge=judge, aspects=["correctness", "temporal"])["metrics"]
    assert (found["correctness"], found["temporal"], found["unreadable"], found["count"]) == (3.0, 3.0, 2, 3)
    assert judge.asked == 10  # what cannot be read is asked three times
    double = [{"video_name": "w", "Q1": "a?", "Q2": "b?", "A": "c", "pred1": "x", "pred2": "y"}]
    judge = Judge(Scripted(lambda text: "{'score': 5}"))
    found = score("five_aspects", write(tmp_path / "two.json", json.dumps(double)), judge=judge)["metrics"]
    assert found["consistency"] == 5
    assert "Question 1: a?\nQuestion 2: b?" in judge.responder.told[0]
    with pytest.raises(UserError, match="aspects=detail: these items can be judged for consistency"):
        score("five_aspects", tmp_path / "two.json", judge=judge, aspects="detail")
    with pytest.raises(RecordError, match=r"generic\.json:3: Q: has no answer"):
        score("five_aspects", answers(tmp_path / "few.jsonl", {"v_0": "p", "v_1": "p"}), gold, judge=judge)
    more = answers(tmp_path / "more.jsonl", {"v_0": "p", "v_1": "p", "v_2": "p", "v_3": "p"})
    with pytest.raises(RecordError, match=r"more\.jsonl:4: question_id: 'v_3' is not in the gold file"):
        score("five_aspects", more, gold, judge=judge)
    assert score("five_aspects", more, gold, judge=judge, extra="ignore")["metrics"]["count"] == 3
    lost = write(tmp_path / "lost.json", json.dumps([{"video_name": "x", "Q": "q", "A": "a"}]))
    with pytest.raises(RecordError, match=r"lost\.json:1: video_name: 'x': .* holds no such video"):
        benchmark("five_aspects").questions(lost)


def test_scores_are_cut_to_whole_numbers_and_bad_ones_raise():
    read = [five_aspects.parse_reply(reply) for reply in ("{'score': 3.9}", "{'score': '-2'}", "nan")]
    assert five_aspects.average_score(read[:2]) == 0.5
    assert read[2] is None
    for reply in ("{'score': None}", "{'grade': 3}", "4", "{'score': '3.5'}"):
        with pytest.raises((TypeError, KeyError, ValueError)):
            five_aspects.average_score([five_aspects.parse_reply(reply)])


# Records


def test_instructions_become_records(tmp_path):
    rows = [{"q": f"q{n}?", "a": f"a{n}", "video_id": f"v{n}"} for n in range(3)]
    source = write(tmp_path / "in.json", json.dumps(rows))
    found = prepare("video_instruct", source, tmp_path / "out.json")
    assert (found["records"], found["left_out"]) == (3, [])
    made = json.loads((tmp_path / "out.json").read_text())
    assert [record["conversations"][0]["value"] for record in made] == ["q0?\n<video>", "<video>\nq1?", "q2?\n<video>"]
    write(tmp_path / "clips/v1.mp4", "")
    write(tmp_path / "clips/v2.mp4", "")
    found = prepare("video_instruct", source, tmp_path / "out.jsonl", suffix=".mp4", videos=tmp_path / "clips")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found["records"] == 2
    assert [line["video"] for line in lines] == ["v1.mp4", "v2.mp4"]
    assert lines[1]["conversations"][0]["value"] == "q2?\n<video>"
    rows[1] = {"q": "q", "video_id": "v1"}
    source.write_text(json.dumps(rows))
    with pytest.raises(RecordError, match=r"in\.json:2: a: is missing"):
        prepare("video_instruct", source, tmp_path / "out.json")
    found = prepare("video_instruct", source, tmp_path / "out.json", on_bad_record="skip")
    assert found["records"] == 2
    assert "in.json:2: a: is missing" in found["left_out"][0]
    with pytest.raises(UserError, match="unknown option 'sufix'; did you mean 'suffix'"):
        prepare("video_instruct", source, tmp_path / "out.json", sufix=".mp4")


# Cost and miniature


def test_costs_are_those_of_the_published_dimensions():
    found = figures()
    expected = {
        "frame": 162_023_964_672,
        "frame_23": 155_285_811_200,
        "tokens": 356,
        "projection": 2_986_344_448,
        "projection_parameters": 4_198_400,
        "prefill": 4_677_624_135_680,
        "prefill_video_llava": 28_845_832_929_280,
        "tokens_without_pooling": 25_600,
        "stored_bytes": 729_088,
    }
    assert {name: found[name] for name in expected} == expected
    assert len(cost().rows) == len(found)


def test_miniature_measures_every_arm():
    measured = miniature.one_seed(0, steps=3, clips=16, held_out=8)
    assert set(measured) == {f"{arm} {question}" for arm in miniature.ARMS for question in miniature.QUESTIONS}
    clips, answers = miniature.draw(40, 0, torch.Generator().manual_seed(0))
    assert miniature.tokens_of(clips, "both").shape == (40, 24, 24)
    organ, tools = miniature.codes(0)
    place = torch.tensor(miniature.PLACES)[answers[:, 0]]
    others = clips.mean((1, 2))
    found = (clips.mean(1)[torch.arange(40), place] - others) @ organ
    assert (found > 0.5 * organ @ organ).float().mean() > 0.9
    assert ((clips[:, 0].mean(1) @ tools.T).argmax(-1) == answers[:, 1]).float().mean() > 0.8
    assert (answers[:, 1] != answers[:, 2]).all()


def test_pictures_follow_from_where_a_file_is_however_its_path_is_written(tmp_path, monkeypatch):
    write(tmp_path / "seq_1/vqa/Classification/7_QA.txt", "organ?|kidney\n")
    monkeypatch.chdir(tmp_path / "seq_1/vqa/Classification")
    asked = benchmark("endovis18_vqa").questions("7_QA.txt", tmp_path)
    assert asked[0].media[0]["image"] == str(tmp_path / "seq_1/left_frames/7.png")


@pytest.mark.parametrize(("name", "problem"), [("x" * 5000, "File name too long"), (" ", "is empty; name the video")])
@pytest.mark.parametrize("task", ["five_aspects", "video_chatgpt_qa"])
def test_videos_whose_name_is_no_file_name_are_named(tmp_path, task, name, problem):
    item = {"question_id": 1, "video_name": name, "Q": "q", "A": "a", "question": "q", "answer": "a"}
    gold = write(tmp_path / "gold.json", json.dumps([item]))
    with pytest.raises(RecordError, match=rf"gold\.json:1: video_name: .*{problem}"):
        benchmark(task).questions(gold)
