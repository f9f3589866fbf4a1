"""MG-LLaVA: golden figures, boxes, regions stage by stage, files, recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.conversation.encode import encode
from llavakit.data.boxes import BoxFile
from llavakit.data.dataset import check_sample
from llavakit.data.mixture import Mixture
from llavakit.data.records import Record, read_record
from llavakit.errors import FieldError, RecordError, UserError
from llavakit.media.regions import Region
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MediaSpec
from llavakit.proof.golden import find_cases, run_case
from llavakit.registry import BENCHMARKS
from llavakit.system import get_system
from llavakit.systems.mg_llava.benchmarks import distance, first_letters, yes_or_no
from llavakit.systems.mg_llava.boxes import cap, suppress
from llavakit.systems.mg_llava.connector import VARIANTS, ConvGate
from llavakit.systems.mg_llava.encoder import ConvNextPyramid, ConvNextPyramidConfig
from llavakit.systems.mg_llava.parity_text import toy_tokenizer
from llavakit.systems.mg_llava.views import LowAndHigh
from llavakit.views.plan import MediaSize
from llavakit.vision.roi_align import roi_mean

GOLDEN = Path(__file__).parent / "golden" / "mg-llava"


def region(*box, label="a", score=0.5):
    return Region(*map(float, box), label, score)


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


@pytest.mark.parametrize("name", ["object_tokens", "end_to_end"])
def test_boxes_of_a_case_without_a_frame_are_in_that_of_the_original(tmp_path, name):
    case = json.loads((GOLDEN / name / "case.json").read_text())
    assert case["config"].pop("box_frame") == 768
    (tmp_path / "case.json").write_text(json.dumps(case))
    for path in (GOLDEN / name).glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    report = run_case(tmp_path, [GOLDEN])
    assert report.status == "passed", report.reason


# Fusion and regions


@pytest.mark.parametrize("variant", VARIANTS)
def test_fusion_starts_from_the_low_features(variant):
    torch.manual_seed(0)
    net, low, high = ConvGate(6, 10, variant), torch.randn(2, 6, 3, 4), torch.randn(2, 10, 3, 4)
    net.init_parameters()
    out = net(low, high)
    assert out.shape == (2, 12, net.width)
    torch.testing.assert_close(out[..., :6], low.flatten(2).transpose(1, 2))
    rest = high.flatten(2).transpose(1, 2) if variant == "concat_raw" else torch.zeros(2, 12, net.width - 6)
    torch.testing.assert_close(out[..., 6:], rest)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = ConvNextPyramidConfig(depths=[1, 1, 1, 1], hidden_sizes=[4, 6, 8, 10])
    return ConvNextPyramid(config).eval()


BOXES = [[0, 0, 64, 96], [3, 5, 40, 70], [0, 0, 0, 0], [60, 60, 64, 64], [-9, 5, 200, 33], [20, 30, 10, 12]]


@torch.no_grad()
def test_regions_stage_by_stage_equal_those_of_the_whole_pyramid(encoder):
    pixels = torch.randn(2, 3, 96, 64)
    features, pooled = encoder.pool_regions(pixels, [BOXES, BOXES[:2]])
    maps = encoder.pyramid(pixels)
    assert maps.shape == (2, 28, 24, 16)
    assert [vectors.shape for vectors in pooled] == [(6, 28), (2, 28)]
    for own, boxes, vectors in zip(maps, (BOXES, BOXES[:2]), pooled, strict=True):
        torch.testing.assert_close(vectors, roi_mean(own, torch.tensor(boxes).float(), 56, 0.25), atol=1e-5, rtol=0)
    torch.testing.assert_close(features, encoder.features(pixels))
    alone = encoder.pool_regions(pixels[1:], [BOXES[1:2]])[1][0]
    torch.testing.assert_close(alone[0], pooled[1][1])


@torch.no_grad()
def test_a_box_around_everything_reads_the_mean_of_the_pyramid(encoder):
    pixels = torch.linspace(-1, 1, 512).repeat(1, 3, 512, 1)
    (vector,) = encoder.pool_regions(pixels, [[[0, 0, 512, 512]]])[1][0]
    torch.testing.assert_close(vector, encoder.pyramid(pixels)[0].mean((1, 2)), atol=0.02, rtol=0)


@pytest.mark.parametrize(("stages", "width"), [("all", 28), ("each", 28), ("last", 10)])
@torch.no_grad()
def test_stages_that_regions_read(encoder, stages, width):
    own = ConvNextPyramid(ConvNextPyramidConfig(**encoder.config.to_dict() | {"region_stages": stages})).eval()
    own.load_state_dict(encoder.state_dict())
    pixels = torch.randn(1, 3, 64, 64)
    (vectors,) = own.pool_regions(pixels, [BOXES])[1]
    assert vectors.shape == (6, width) == (6, own.config.region_width)
    last = list(own.stages(pixels))[-1][0]
    if stages != "all":
        bins = 7 if stages == "last" else 56
        torch.testing.assert_close(vectors[:, -10:], roi_mean(last, torch.tensor(BOXES).float(), bins, 1 / 32))
    with pytest.raises(UserError, match="region_stages: must be one of all, each, last, not 'some'"):
        ConvNextPyramidConfig(region_stages="some")


# Boxes


def test_suppression_drops_what_overlaps_strictly_more_than_the_threshold():
    one, half = region(0, 0, 10, 10, score=0.9), region(0, 5, 10, 15, score=0.5)  # overlap 1/3
    other = region(0, 5, 10, 15, label="b", score=0.7)
    assert suppress([half, one, other], 0.2) == [one, other]
    assert suppress([half, one], 0.34) == [one, half]
    empty = [region(5, 5, 5, 5), region(5, 5, 5, 5)]
    assert suppress(empty, 0.0) == empty
    assert suppress([], 0.2) == []


def test_caps():
    many = [region(n, 0, n + 1, 1, label="ab"[n % 2], score=1 - n / 200) for n in range(120)]
    assert cap(many, "per_category", None, near=True) == many
    assert cap(many[:100], "per_category", 100, near=False) == many[:100]
    capped = cap(many, "per_category", 100, near=False)
    assert [r.label for r in capped] == ["a"] * 20 + ["b"] * 20
    assert capped[:20] == many[:40:2]
    assert len(cap(many, "per_category", 50, near=False)) == 40  # undefined in the original
    assert len(cap(many, "per_category", 49, near=False)) == 10
    assert cap(many[:3], "per_category", 100, near=True) == many[:2]
    assert cap(many, "per_image", 15, near=False) == many[:15]
    assert cap(many, "per_image", None, near=False) == many
    assert cap(many, "per_image", None, near=True) == many[:20]
    with pytest.raises(UserError, match="limit_mode"):
        cap(many, "best", 3, near=False)


def test_boxes_are_brought_into_the_view():
    planner, size = LowAndHigh(size=768), MediaSize(1, 480, 640)
    kept = planner.select_regions(size, [region(100, 40, 200, 240)], 10)
    assert planner.plan(size, kept).views[1].regions == ((120.0, 144.0, 240.0, 384.0),)
    assert planner.plan(size).views[1].regions == ((0.0, 0.0, 0.0, 0.0),)
    small = LowAndHigh(size=96, box_frame=768)
    assert small.plan(size, kept).views[1].regions == ((15.0, 18.0, 30.0, 48.0),)
    crop = LowAndHigh(size=96, aspect="square")
    sides = [region(0, 0, 50, 50), region(300, 100, 340, 140)]  # of 640 x 480: the first lies left of the crop
    assert crop.plan(size, crop.select_regions(size, sides, 0)).views[1].regions == ((44.0, 20.0, 52.0, 28.0),)
    touching = crop.plan(size, [region(0, 0, 80, 40), region(560, 0, 600, 40), region(0, 0, 77, 40)]).views[1].regions
    assert touching == ((0.0, 0.0, 0.0, 8.0), (96.0, 0.0, 96.0, 8.0))  # what only touches the edge is kept
    exact = LowAndHigh(size=96, rounded=False)
    (box,) = exact.plan(size, [region(1, 1, 3, 3)]).views[1].regions
    assert box == pytest.approx((0.15, 12.15, 0.45, 12.45))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (region(700, 10, 800, 20), r"boxes.boxes.0: \[700, 10, 800, 20\] lies outside the picture of 640 x 480 pixels"),
        (region(-20, -30, -1, 10), "lies outside the picture"),
        (region(1, 2, 3, 4, score=None), "boxes.scores: box 0 has no score"),
        (region(1, 2, 3, 4, label=None), "boxes.labels: box 0 has no label"),
    ],
)
def test_boxes_that_cannot_be_meant_are_refused(box, message):
    with pytest.raises(FieldError, match=message):
        LowAndHigh().select_regions(MediaSize(1, 480, 640), [box], 10)


def test_boxes_in_the_padding_and_over_the_edge_are_detections_too():
    size, boxes = MediaSize(1, 480, 640), [region(0, 500, 50, 600, label="b"), region(-3, -3, 20, 20)]
    assert LowAndHigh().select_regions(size, boxes, 10) == boxes


# Recipe


def test_published_recipe_and_parameters():
    from llavakit.training.build import build_meta
    from llavakit.training.recipe import load_recipe

    net = build_meta(load_recipe(get_system("mg-llava").recipe))
    connector = net.model.multi_modal_projector
    assert sum(p.numel() for p in connector.fuse.parameters()) == 6_085_121
    assert sum(p.numel() for p in connector.objects.parameters()) == 28_581_888
    assert net.model.media.count("image", MediaSize(1, 480, 640)) == 577
    boxes = tuple(region(n, 0, n + 5, 5) for n in range(7))
    assert len(net.model.media.plan("image", MediaSize(1, 480, 640), boxes).views[1].regions) == 7


# Files


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The end-to-end case as the authors publish: trained parts in a .pth, language model and encoders elsewhere."""
    root = tmp_path_factory.mktemp("published")
    config = json.loads((GOLDEN / "end_to_end" / "case.json").read_text())["config"]
    weights = load_file(GOLDEN / "end_to_end" / "weights.safetensors")
    folder, base, clip, convnext = (root / name for name in ("mg", "vicuna", "clip", "convnext"))
    for place in (folder, base, clip, convnext):
        place.mkdir()
    trained = {n: t for n, t in weights.items() if not n.startswith("visual_encoder")}
    torch.save({"state_dict": trained, "meta": {"epoch": 1}}, folder / "iter_10805.pth")
    text = {"model_type": "llama", **config["llama"], "vocab_size": 64}
    (base / "config.json").write_text(json.dumps(text))
    llm = {n.removeprefix("llm."): t for n, t in weights.items() if n.startswith("llm.")}
    save_file(llm, base / "model.safetensors")
    (clip / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **config["clip"]}))
    low = {n.removeprefix("visual_encoder."): t for n, t in weights.items() if n.startswith("visual_encoder.")}
    save_file(low, clip / "model.safetensors")
    high = {n.removeprefix("visual_encoder_aux."): t for n, t in weights.items() if n.startswith("visual_encoder_aux.")}
    high = {n.replace("vision_", "visual.trunk."): t for n, t in high.items()}
    torch.save({**high, "logit_scale": torch.ones(())}, convnext / "open_clip_pytorch_model.bin")
    (convnext / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {}}}))
    return folder, base, f"vision_tower={clip},detail_encoder={convnext}", weights


def test_published_files_open_with_their_encoders_from_elsewhere_and_round_trip(published, tmp_path):
    folder, base, towers, weights = published
    checkpoint = open_checkpoint(folder, base=base, vision_tower=towers)
    assert (checkpoint.config.system, checkpoint.config.template) == ("mg-llava", "mg_vicuna")
    views = checkpoint.config.media["image"]["views"]
    assert (views["size"], views["low_size"], views["limit_num"], views["box_frame"]) == (768, 42, 100, 768)
    model = build(checkpoint)
    torch.testing.assert_close(
        model.model.detail_encoder.encoder.stages[3].layers[0].dwconv.weight,
        weights["visual_encoder_aux.vision_stages.3.blocks.0.conv_dw.weight"],
    )
    convert(folder, tmp_path / "native", to="llavakit", base=base, vision_tower=towers)
    convert(tmp_path / "native", tmp_path / "again", to="original")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(weights)
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    back = open_checkpoint(tmp_path / "again")
    assert back.config.to_dict()["media"] == checkpoint.config.to_dict()["media"]


def test_stage_one_files_take_the_language_model_from_its_folder(published, tmp_path):
    _, base, towers, weights = published
    trained = {f"module.{n}": t for n, t in weights.items() if n.split("_")[0] in ("projector.", "bbox", "fuse")}
    trained |= {f"module.{n}": t for n, t in weights.items() if n.startswith("projector.")}
    (tmp_path / "iter_4947.pth").mkdir()
    torch.save({"module": trained}, tmp_path / "iter_4947.pth" / "mp_rank_00_model_states.pt")
    checkpoint = open_checkpoint(tmp_path, base=base, vision_tower=towers)
    assert torch.equal(checkpoint.state["lm_head.weight"], weights["llm.lm_head.weight"])
    build(checkpoint)


def test_what_the_published_files_lack_is_asked_for_in_one_line(published, tmp_path):
    folder, base, towers, weights = published
    with pytest.raises(UserError, match="--base"):
        open_checkpoint(folder, vision_tower=towers)
    with pytest.raises(UserError, match=r"no tensors of the encoder detail_encoder .*--vision-tower"):
        open_checkpoint(folder, base=base, vision_tower=towers.split(",")[0])
    with pytest.raises(UserError, match="should be NAME=FOLDER"):
        open_checkpoint(folder, base=base, vision_tower="vision_tower=")
    torch.save(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"holds a\.pth and b.pth"):
        open_checkpoint(tmp_path, base=base)
    (tmp_path / "b.pth").unlink()
    torch.save({"bbox_projector.x": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="is no tensor"):
        open_checkpoint(tmp_path, base=base)


def test_an_unknown_key_of_an_export_is_refused(published, tmp_path):
    folder, base, towers, _ = published
    convert(folder, tmp_path / "out", to="original", base=base, vision_tower=towers)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    for change in ({"gate": "per_channel"}, {"box_rules": {"cap": 3}}):
        (tmp_path / "out" / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(UserError, match=r"gate|cap"):
            open_checkpoint(tmp_path / "out")


# Box files


def write_boxes(path, *entries, keyed=False, lines=False):
    if keyed:
        content = json.dumps({entry.pop("id"): entry for entry in entries})
    else:
        content = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    path.write_text(content)
    return path


ENTRY = {"id": "7", "boxes": [[1, 2, 9, 9]], "scores": [0.5], "labels": ["cup"]}


@pytest.mark.parametrize("form", [{}, {"keyed": True}, {"lines": True}])
def test_every_form_of_a_box_file_is_looked_up_by_id(tmp_path, form):
    path = write_boxes(
        tmp_path / "boxes.json", dict(ENTRY), dict(ENTRY, id="x y", boxes=[], scores=[], labels=[]), **form
    )
    boxes = BoxFile(path)
    assert list(boxes) == ["7", "x y"]
    assert 7 in boxes
    assert boxes.part(7) == {"type": "boxes", "boxes": [[1, 2, 9, 9]], "labels": ["cup"], "scores": [0.5]}
    assert boxes.part("x y")["boxes"] == []


@pytest.mark.parametrize(
    ("entries", "record", "message"),
    [
        ([ENTRY], {"id": "8"}, r"records.json:1: id: '8' has no entry in .*boxes.json"),
        ([ENTRY], {}, r"records.json:1: id: is missing"),
        ([ENTRY | {"boxes": [[9, 2, 1, 9]]}], {"id": "7"}, r"boxes.json:1: entry.boxes.0: is inverted"),
        ([ENTRY | {"labels": None}], {"id": "7"}, r"boxes.json:1: labels: is missing"),
        ([{**ENTRY, "scores": [0.1, 0.2]}], {"id": "7"}, r"boxes.json:1: entry.scores: must be a list of 1"),
        ([ENTRY | {"frames": []}], {"id": "7"}, r"boxes.json:1: frames"),
        ([ENTRY | {"score": 1}], {"id": "7"}, r"boxes.json:1: score: unknown"),
        ([ENTRY, ENTRY], {"id": "7"}, r"boxes.json:2: id: '7' was used in 1 already"),
        ([ENTRY], {"id": "7", "image": ["a.png", "a.png"]}, r"records.json:1: id: the record has 2 pictures"),
        ([ENTRY], {"id": "7", "boxes": {"boxes": []}}, r"records.json:1: boxes: the record has boxes of its own"),
    ],
)
def test_boxes_that_do_not_fit_a_record_are_one_line(tmp_path, entries, record, message):
    boxes = write_boxes(tmp_path / "boxes.json", *map(dict, entries))
    record = {"image": "a.png", "conversations": [], **record}
    marks = "<image>" * (len(record["image"]) if isinstance(record["image"], list) else 1)
    record["conversations"] = [{"from": "human", "value": f"{marks}\nx"}, {"from": "gpt", "value": "y"}]
    records = tmp_path / "records.json"
    records.write_text(json.dumps([record]))
    with pytest.raises(RecordError, match=message) as raised:
        Mixture({"path": str(records), "boxes": str(boxes)}, check_files=False)[0]
    assert "\n" not in str(raised.value)


def test_records_get_their_boxes_and_text_alone_needs_none(tmp_path):
    boxes = write_boxes(tmp_path / "boxes.json", dict(ENTRY))
    turns = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    alone = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    parts = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "x"}]}]
    parts += [{"role": "assistant", "content": "y"}]
    own = {"messages": parts, "boxes": {"boxes": [[0, 0, 1, 1]]}}
    records = [
        {"id": 7, "image": "a.png", "conversations": turns},
        {"conversations": alone},
        {"id": 7, "messages": parts},
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    found = list(Mixture({"path": str(tmp_path / "records.json"), "boxes": str(boxes)}, check_files=False))
    kinds = [[part["type"] for part in record.messages[0]["content"]] for record in found]
    assert kinds == [["image", "boxes", "text"], ["text"], ["image", "boxes", "text"]]
    assert found[0].messages[0]["content"][1]["boxes"] == [[1, 2, 9, 9]]
    direct = read_record(own, "f.json", 1, check_files=False)
    assert [part["type"] for part in direct.messages[0]["content"]] == ["image", "boxes", "text"]
    with pytest.raises(RecordError, match="2 entries, but the record has 1 images"):
        read_record(own | {"boxes": [{"boxes": []}] * 2}, "f.json", 1, check_files=False)


# Whole model


@torch.no_grad()
def test_object_tokens_follow_their_boxes_and_nothing_else(published):
    folder, base, towers, _ = published
    checkpoint = open_checkpoint(folder, base=base, vision_tower=towers)
    checkpoint.config.media["image"]["views"]["size"] = 96
    net = build(checkpoint).model
    torch.manual_seed(0)
    views = [torch.randn(3, 42, 42), torch.randn(3, 96, 96)]
    sizes = torch.tensor([[1, 768, 768]])

    def tokens(*boxes):
        regions = [torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)]
        return net.get_image_features(views, visual_sizes=sizes, visual_regions=regions).pooler_output[0]

    one, other = [0, 0, 300, 200], [400, 10, 700, 700]
    both, turned = tokens(one, other), tokens(other, one)
    assert both.shape == (9 + 2, 24)
    torch.testing.assert_close(both[:9], turned[:9])
    torch.testing.assert_close(both[[10, 9]], turned[9:], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens(one)[9], both[9], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens(), tokens([0, 0, 0, 0]))
    assert (both[9] - both[10]).abs().max() > 1e-3
    pair = net.get_image_features(
        views * 2,
        visual_sizes=sizes.repeat(2, 1),
        visual_regions=[torch.tensor([one], dtype=torch.float64), torch.tensor([other], dtype=torch.float64)],
    ).pooler_output
    torch.testing.assert_close(torch.stack([pair[0][9], pair[1][9]]), both[9:], atol=1e-5, rtol=0)


def test_more_boxes_than_fit_are_a_broken_record():
    ids = [1, *[99] * 700, 5, 6]
    with pytest.raises(RecordError, match=r"f.json:4: record: takes 703 tokens, max_length is 600, and the cut would"):
        check_sample({"input_ids": ids, "labels": ids}, Record([], "f.json", 4, {}), 600, 99)


def test_grids_that_differ_are_one_line(published):
    folder, base, towers, _ = published
    checkpoint = open_checkpoint(folder, base=base, vision_tower=towers)
    with pytest.raises(UserError, match=r"both encoders on one grid, they have 3 x 3 and 24 x 24"):
        MediaSpec(checkpoint.config).count("image", MediaSize(1, 20, 20))


# Templates and benchmarks


def test_templates_write_their_begin_tokens():
    tokenizer = toy_tokenizer()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    encoded = encode(turns, "mg_vicuna", tokenizer, add_generation_prompt=True)
    assert encoded.text == "<s>USER: a ASSISTANT:b</s>\n<s>USER: c ASSISTANT:"
    assert encoded.ids.count(tokenizer.bos_token_id) == 2
    encoded = encode([{"role": "system", "content": "Be brief."}, *turns], "mg_phi_3", tokenizer)
    assert encoded.text == "<s><|system|>Be brief.<|end|>\n<|user|>a<|end|>\n<|assistant|>\nb<|end|>\n"
    assert encoded.notes == ("a user turn after the last answer is left out, as the template 'mg_phi_3' was trained",)
    assert [tokenizer.decode([i]) for i in encoded.labels if i >= 0] == ["b", "<|end|>"]


def test_answers_are_read_as_published():
    assert [yes_or_no(text) for text in ("Yes.", "no, none", "yes/no", "maybe", "")] == ["Yes", "No", *["Unknown"] * 3]
    assert [first_letters(text) for text in ("(C)", "Answer: B", "none", "AB")] == ["C", "A", "", "AB"]
    assert distance("ABC", "abd") == pytest.approx(1 / 3)
    assert distance("", "") == 0.0


def test_questions_keep_their_blanks_and_training_strips_them():
    tokenizer = toy_tokenizer()
    asked = {"role": "user", "content": [{"type": "image", "image": "-"}, {"type": "text", "text": " a \n"}]}
    prompt = encode([asked], "mg_qwen", tokenizer, add_generation_prompt=True)
    assert prompt.text.startswith("<s><|im_start|>user\n<image>\n a \n<|im_end|>")
    sample = encode([asked, {"role": "assistant", "content": " b"}], "mg_qwen", tokenizer)
    assert sample.text == "<s><|im_start|>user\n<image>\na<|im_end|>\n<|im_start|>assistant\n b<|im_end|>\n"


def test_multiple_choice_shows_options_behind_d(tmp_path):
    table = tmp_path / "questions.tsv"
    table.write_text("index\tquestion\tA\tB\tC\tD\tE\timage\n1\tWhich?\tv\tw\tx\ty\tz\tp.jpg\n")
    (question,) = BENCHMARKS.get("mg_multiple_choice")().questions(table)
    assert "D. y\nE. z\n" in question.text
    assert question.stored["option_char"] == list("ABCDE")


@pytest.mark.slow
def test_miniature_measures_every_arm():
    from llavakit.systems.mg_llava.miniature import run

    verdict = run(seeds=(0,), steps=4, held_out=32)
    assert len(verdict.comparisons) == 3
    assert all(0 <= value <= 1 for c in verdict.comparisons for side in (c.idea, c.baseline) for value in side.values)


# With the views of other systems


@pytest.mark.parametrize(
    ("views", "arrange"),
    [
        (
            {"type": "anyres", "size": tiny.SIZE, "pinpoints": "(1x1),...,(3x3)"},
            {"type": "spatial_unpad", "max_tiles": 2},
        ),
        ({"type": "squash", "size": tiny.SIZE}, {"type": "flat"}),
    ],
)
def test_object_tokens_behind_the_tiles_of_another_system(views, arrange):
    convnext = {"model_type": "convnext_pyramid", "depths": [1, 1], "hidden_sizes": [4, 6], "num_stages": 2}
    image = {"views": {"type": "with_objects", "views": views, "size": 32}}
    fields = tiny.config().to_dict() | {
        "extra_encoders": {"detail_encoder": {"config": convnext, "layer": -1}},
        "connector": {"type": "with_objects", "encoder": ["vision_tower", "detail_encoder"]},
        "media": {"image": {**image, "arrange": {"type": "then_objects", "inner": arrange}}},
    }
    torch.manual_seed(0)
    net = LlavakitForConditionalGeneration(LlavakitConfig.from_dict(fields)).eval()
    plain = tiny.config().to_dict() | {"media": {"image": {"views": views, "arrange": arrange}}}
    size, boxes = MediaSize(1, 30, 50), (region(0, 0, 9, 9), region(10, 10, 40, 30))
    bare = sum(run.visual for run in MediaSpec(LlavakitConfig.from_dict(plain)).layout("image", size))
    spec = net.model.media
    assert sum(run.visual for run in spec.layout("image", size, boxes)) == bare + 2
    picture = Image.new("RGB", (50, 30), "red")
    picture.paste("blue", (0, 0, 9, 9))
    views = [torch.from_numpy(v) for v in spec.route("image").planner.cut(picture, spec.plan("image", size, boxes))]
    corners = torch.tensor([r.box for r in boxes], dtype=torch.float64)
    with torch.no_grad():
        (found,) = net.model.get_image_features(
            views, visual_sizes=torch.tensor([size]), visual_regions=[corners]
        ).pooler_output
        (turned,) = net.model.get_image_features(
            views, visual_sizes=torch.tensor([size]), visual_regions=[corners.flip(0)]
        ).pooler_output
    assert len(found) == bare + 2
    torch.testing.assert_close(found[:-2], turned[:-2])
    torch.testing.assert_close(found[[-1, -2]], turned[-2:], atol=1e-5, rtol=0)
