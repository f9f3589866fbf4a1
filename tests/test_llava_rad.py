"""LLaVA-Rad: golden figures, the published files, annotation records, recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import TEXT, WIDTH, language_tensors, vocabulary, write_tokenizer

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, load_processor, open_checkpoint
from llavakit.data.preparation import prepare
from llavakit.errors import CheckpointError, RecordError, UserError
from llavakit.evaluation.metrics import reports
from llavakit.evaluation.reports.rubric import read_rubric
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.llava_rad.checkpoint import Published
from llavakit.systems.llava_rad.cost import cost
from llavakit.views.image import Square
from llavakit.views.plan import MediaSize

GOLDEN = Path(__file__).parent / "golden" / "llava-rad"
TOWER, LAYERS, PATCH, SIDE = 64, 3, 14, 28  # one head of 64 channels, 2 x 2 patches


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == ("declined" if path.name == "batches" else "passed"), report.reason


def trunk(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """timm's ViT with layer scale, small."""
    shapes = {
        "cls_token": (1, 1, TOWER),
        "pos_embed": (1, 5, TOWER),
        "patch_embed.proj.weight": (TOWER, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (TOWER,),
        "norm.weight": (TOWER,),
        "norm.bias": (TOWER,),
    }
    for number in range(LAYERS):
        block = f"blocks.{number}."
        for name, size in (("attn.qkv", (3, 1)), ("attn.proj", (1, 1)), ("mlp.fc1", (4, 1)), ("mlp.fc2", (1, 4))):
            shapes |= {
                f"{block}{name}.weight": tuple(TOWER * k for k in size),
                f"{block}{name}.bias": (TOWER * size[0],),
            }
        shapes |= {f"{block}{norm}.{kind}": (TOWER,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{block}{scale}.gamma": (TOWER,) for scale in ("ls1", "ls2")}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@pytest.fixture
def published(tmp_path):
    """`microsoft/llava-rad`'s files beside its language model, small, under the true names."""
    generator = torch.Generator().manual_seed(0)
    folder, base = tmp_path / "llava-rad", tmp_path / "vicuna"
    for place in (folder, base):
        place.mkdir()
        write_tokenizer(place)
    language = language_tensors(generator, vocabulary())
    language["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(language, base / "model.safetensors")
    text = {"vocab_size": vocabulary(), **TEXT}
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **text}))
    raw = {
        **text,
        "model_type": "llava",
        "mm_vision_tower": "biomedclip_cxr_518",
        "mm_vision_tower_config": "biomedclipcxr_518.json",
        "mm_vision_tower_checkpoint": "biomedclipcxr_518_checkpoint.pt",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": TOWER,
        "image_aspect_ratio": "square",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    vision = {"timm_model_name": "vit_base_patch14_dinov2", "image_size": SIDE}
    described = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {"context_length": 256}}
    (folder / "biomedclipcxr_518.json").write_text(json.dumps(described))
    tower = trunk(generator)
    state = {f"module.visual.trunk.{name}": tensor for name, tensor in tower.items()}
    state |= {"module.visual.head.proj.weight": torch.zeros(8, TOWER), "module.logit_scale": torch.tensor(1.0)}
    state |= {"module.text.transformer.pooler.dense.weight": torch.zeros(4, 4)}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, folder / "biomedclipcxr_518_checkpoint.pt")
    prefix = "base_model.model.model."
    sizes = {"0": (WIDTH, TOWER), "2": (WIDTH, WIDTH)}
    connector = {
        f"{prefix}mm_projector.{n}.{kind}": torch.randn(shape if kind == "weight" else shape[:1], generator=generator)
        for n, shape in sizes.items()
        for kind in ("weight", "bias")
    }
    torch.save(connector, folder / "non_lora_trainables.bin")
    targets = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    options = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none"}
    options |= {"target_modules": targets, "task_type": "CAUSAL_LM", "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    adapter = {}
    for name, tensor in language.items():
        if name.endswith("_proj.weight"):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{layer}.lora_A.weight"] = torch.randn(4, tensor.shape[1], generator=generator) * 0.1
            adapter[f"{layer}.lora_B.weight"] = torch.randn(tensor.shape[0], 4, generator=generator) * 0.1
    torch.save(adapter, folder / "adapter_model.bin")
    return folder, base, tower, language, adapter


def test_published_files_open_merged_with_the_encoder_beside_them(published):
    folder, base, _, language, adapter = published
    checkpoint = open_checkpoint(folder, base=base)
    assert (checkpoint.config.system, checkpoint.config.template) == ("llava-rad", "v1")
    net = build(checkpoint)
    layer = "model.layers.1.mlp.up_proj"
    low, high = (adapter[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
    merged = net.model.language_model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(merged.data, language[f"{layer}.weight"] + 2.0 * high @ low, atol=1e-5, rtol=1e-5)
    processor = load_processor(checkpoint, base)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 71, 3), dtype=np.uint8))
    part = {"type": "image", "image": picture}
    asked = {"role": "user", "content": [part, {"type": "text", "text": "Findings?"}]}
    sample = processor.encode([asked], add_generation_prompt=True)
    assert sample["pixel_values"][0].shape == (3, SIDE, SIDE)
    assert int((torch.as_tensor(sample["input_ids"]) == processor.image_token_id).sum()) == 4
    before = net.get_image_features(sample["pixel_values"][0][None]).pooler_output[0]
    with torch.no_grad():
        net.model.vision_tower.layernorm.weight.zero_()  # the feature is read in front of it
    assert torch.equal(net.get_image_features(sample["pixel_values"][0][None]).pooler_output[0], before)


def test_export_holds_the_encoder_under_timms_names_and_comes_back(published, tmp_path):
    folder, base, tower, *_ = published
    convert(folder, tmp_path / "native", to="llavakit", base=base)
    convert(tmp_path / "native", tmp_path / "again", to="original")
    written = load_file(tmp_path / "again" / "model.safetensors")
    own = "model.vision_tower.vision_tower.vit."
    assert {name.removeprefix(own) for name in written if name.startswith(own)} == set(tower)
    for name, tensor in tower.items():
        assert torch.equal(written[own + name], tensor), name
    one, other = (build(open_checkpoint(tmp_path / name)) for name in ("native", "again"))
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"mm_vision_tower_checkpoint": "../secret.pt"}, "should be the name of a file in the folder"),
        ("config.json", {"mm_vision_tower_checkpoint": "gone.pt"}, "name the encoder's folder with --vision-tower"),
        ("config.json", {"image_aspect_ratio": "pad"}, "image_aspect_ratio"),
        ("config.json", {"mm_hidden_size": 1024}, "mm_hidden_size is 1024"),
        ("biomedclipcxr_518.json", {"vision_cfg": {"timm_model_name": "convnext"}}, "timm_model_name 'convnext'"),
        ("biomedclipcxr_518.json", {"vision_cfg": None}, "timm_model_name None"),
    ],
)
def test_files_that_do_not_fit_are_one_line(published, file, change, message):
    folder, base, *_ = published
    raw = json.loads((folder / file).read_text()) | change
    if "gone.pt" in change.values():
        raw |= {"mm_hidden_size": None, "mm_vision_tower_config": None}
    (folder / file).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder, base=base)
    assert "\n" not in str(caught.value)


def test_published_shapes_counts_and_recipe():
    from llavakit.training.build import build_meta
    from llavakit.training.recipe import load_recipe

    net = build_meta(load_recipe(get_system("llava-rad").recipe))
    shapes = {name: tuple(tensor.shape) for name, tensor in Published().write_state(net.config, net.state_dict())}
    own = "model.vision_tower.vision_tower.vit."
    assert shapes[f"{own}pos_embed"] == (1, 1370, 768)
    assert shapes[f"{own}blocks.11.attn.qkv.weight"] == (2304, 768)
    assert shapes["model.mm_projector.0.weight"] == (4096, 768)
    trunk = sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(own))
    counted = {row.name: row.value for row in cost().rows}
    assert trunk == counted["parameters"] == 86_579_712
    assert counted["connector"] == 19_931_136
    assert counted["LoRA of rank 64"] == 159_907_840
    assert counted["12 layers"] == 303_147_436_032
    assert counted["the 11 layers that are read"] == 277_988_186_112
    assert counted["connector on 1369 tokens"] == 54_549_020_672
    assert counted["prefill of 1433 tokens"] == 20_012_503_400_448
    assert net.model.media.count("image", MediaSize(1, 3056, 2544)) == 1369


@pytest.mark.parametrize(("height", "width"), [(28, 31), (31, 28), (28, 33), (28, 28), (20, 23)])
def test_the_middle_is_split_as_torchvision_does(height, width):
    """Half to even: an odd rest of 3 leaves 2 in front, where transformers' processors leave 1."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    planner = Square(size=28, rounded=True)
    (view,) = planner.render(image, planner.plan(MediaSize(1, height, width)))
    short = min(height, width)
    resized = image.resize((int(28 * width / short), int(28 * height / short)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 28) / 2), round((resized.height - 28) / 2)
    wanted = resized.crop((left, top, left + 28, top + 28))
    assert np.abs(np.asarray(view, np.int16) - np.asarray(wanted, np.int16)).max() <= 1


def write_annotations(path: Path, records: list) -> Path:
    path.write_text(json.dumps(records))
    return path


def annotation(**fields) -> dict:
    turns = [{"from": "human", "value": "<image>\nold"}, {"from": "gpt", "value": "Clear."}]
    return {"id": "a", "image": "mimic/mimic/p.jpg", "view": "PA", "conversations": turns, **fields}


def test_annotations_become_records(tmp_path):
    records = [annotation(), annotation(view="ap"), annotation(view=None), annotation(reason="a\n\nb")]
    source = write_annotations(tmp_path / "a.json", records)
    counts = prepare("mimic_cxr_findings", source, tmp_path / "train.jsonl")
    assert (counts["records"], counts["written"], counts["left_out"]) == (4, 2, [])
    written = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [record["image"] for record in written] == ["mimic/p.jpg"] * 2
    assert written[0]["conversations"][0]["value"].endswith("in the radiology image.")
    assert written[1]["conversations"][0]["value"].endswith("following indication: a  b")
    counts = prepare("mimic_cxr_findings", source, tmp_path / "t.json", selection="mimic_test_findings")
    assert (counts["written"], json.loads((tmp_path / "t.json").read_text())) == (0, [])
    prepare("mimic_cxr_findings", source, tmp_path / "v.json", selection="mimic_cxr_all_views_findings")
    asked = [record["conversations"][0]["value"] for record in json.loads((tmp_path / "v.json").read_text())]
    assert [text.split(" view")[0].rpartition(" ")[2] for text in asked] == ["PA", "ap", "Unknown", "PA"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"conversations": [{"from": "human", "value": "x"}]}, "a.json:2: conversations: "),
        ({"conversations": None}, "a.json:2: conversations: is None"),
        ({"image": None}, "a.json:2: image: is None"),
        ({"view": 3}, "a.json:2: view: is 3"),
        ({"reason": ["x"]}, "a.json:2: reason: "),
    ],
)
def test_broken_annotations_are_named_or_left_out(tmp_path, broken, message):
    source = write_annotations(tmp_path / "a.json", [annotation(), annotation(**broken)])
    with pytest.raises(RecordError, match=message):
        prepare("mimic_cxr_findings", source, tmp_path / "train.json")
    assert not (tmp_path / "train.json").exists()
    counts = prepare("mimic_cxr_findings", source, tmp_path / "train.json", on_bad_record="skip")
    assert counts["written"] == 1
    assert len(counts["left_out"]) == 1
    with pytest.raises(UserError, match="did you mean 'mimic_test_findings'"):
        prepare("mimic_cxr_findings", source, tmp_path / "train.json", selection="mimic_test_finding")


def test_scores_of_reports_hold_their_bounds():
    graph = {"1": {"tokens": "Edema", "label": "OBS-DP", "relations": []}}
    lower = {"1": {"tokens": "edema", "label": "OBS-DP", "relations": []}}
    both = {**graph, "2": {"tokens": "lung", "label": "ANAT-DP", "relations": [["modify", "1"]]}}
    for level in reports.LEVELS:
        assert reports.radgraph_f1(both, both, level) == (1.0, 1.0, 1.0)
        assert reports.radgraph_f1(graph, lower, level) == (0.0, 0.0, 0.0)
        assert reports.radgraph_f1(graph, lower, level, lower=True) == (1.0, 1.0, 1.0)
        assert reports.radgraph_f1({}, graph, level) == (0.0, 0.0, 0.0)
        f1, precision, recall = reports.radgraph_f1(graph, both, level)
        assert (f1, recall, precision) == reports.radgraph_f1(both, graph, level)
    classes = np.random.default_rng(0).integers(0, 4, (14, 9))
    classes[:, 0], classes[3] = reports.POSITIVE, reports.BLANK
    same = reports.chexbert_f1(classes, classes)
    assert same["micro avg"]["f1-score"] == 1.0
    assert same["macro avg"]["f1-score"] == pytest.approx(13 / 14)  # a condition that never occurs counts as 0
    unit = torch.eye(4)
    assert reports.retrieval_ranks(unit, unit)["image_to_text_mean_rank"] == 1.0
    assert reports.retrieval_ranks(unit, unit.roll(1, 0), at=(1,))["text_to_image_R@1"] == 0.0


@pytest.mark.parametrize(
    ("significant", "wanted"),
    [
        (" [(A, 1), (B, 0)]", {"false_positive_finding": 1, "omission_finding": 0}),
        (" ((A, 1), (Z, 2))", {"false_positive_finding": 1, "Z": 2}),
        (" [(A, 1, 7), (B, 0)]", {"false_positive_finding": 1, "omission_finding": 0}),
        (" [(A, one)]", None),
        (" ", None),
    ],
)
def test_counts_of_a_judge_are_read_or_asked_for_again(significant, wanted):
    rubric = read_rubric("chexprompt")
    first, second = rubric.severities.values()
    found = rubric.parse(f"Sure.\n{first}{significant}\n{second} [(C, 2)]\nExplanation: (D, 9)")
    assert found == [wanted, {"incorrect_location": 2}]
    assert rubric.parse(significant) is None
    glued = rubric.parse(f"{first}[(A, 1), (B, 0)]\n{second}[(C, 2)]")  # no blank: the heading becomes a name
    assert glued == [{f"{first}A": 1, "omission_finding": 0}, {"incorrect_location": 2}]
    assert rubric.parse(f"{second} [(C, 2)]\n{first} [(A, 1)]")[1] is None
    assert rubric.counts(f"{first}{significant}\n{second} [(C, 2)]") is None  # not every type was counted
    assert rubric.counts(rubric.examples.split("Errors:\n")[1].split("##")[0])[0]["false_positive_finding"] == 1


def ask(chat, image, indication: str, **options) -> str:
    text = f"Provide a description of the findings in the radiology image given the following indication: {indication}"
    part = {"type": "image", "image": image}
    return chat.chat([{"role": "user", "content": [part, {"type": "text", "text": text}]}], **options)


def test_chat_reads_a_dicom_as_its_picture(published, tmp_path):
    """MONOCHROME1 is shown inverted: the file of inverted values is the same picture."""
    from test_media_dicom import radiograph

    import llavakit

    folder, base, *_ = published
    chat = llavakit.load(folder, base=base, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 71)).astype(np.uint16)
    replies = []
    for name, values, kind in (("a", pixels, "MONOCHROME2"), ("b", 4095 - pixels, "MONOCHROME1")):
        (tmp_path / f"{name}.dcm").write_bytes(radiograph(values, PhotometricInterpretation=kind, BitsStored=12))
        replies.append(ask(chat, str(tmp_path / f"{name}.dcm"), "Cough.", max_new_tokens=6))
    grey = np.round(pixels / 4095 * 255).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    replies.append(ask(chat, str(tmp_path / "a.png"), "Cough.", max_new_tokens=6))
    assert replies[0] == replies[1]
    assert replies[0]


def test_any_batch_gives_each_request_what_it_gets_alone(published):
    """The original batches queries of equal length only; here lengths, pictures and ends differ in one batch."""
    from llavakit.generation.engine import Engine
    from llavakit.generation.request import Request, SamplingParams

    folder, base, *_ = published
    checkpoint = open_checkpoint(folder, base=base)
    net, processor = build(checkpoint).eval(), load_processor(checkpoint, base)
    rng = np.random.default_rng(1)
    requests = []
    for n, words in enumerate(("Cough.", "Fever and cough for two weeks, rule out pneumonia.", "", "Fall.", "Line.")):
        picture = Image.fromarray(rng.integers(0, 255, (28 + n, 40, 3), dtype=np.uint8))
        content = [{"type": "image", "image": picture}, {"type": "text", "text": f"Findings given: {words}"}]
        sample = processor.encode([{"role": "user", "content": content}], add_generation_prompt=True)
        fields = {name: torch.as_tensor(sample[name]) for name in ("input_ids", "visual_sizes", "visual_modalities")}
        fields["pixel_values"] = sample["pixel_values"]
        requests.append(Request(**fields, sampling=SamplingParams(max_new_tokens=8 - n)))
    alone = [Engine(net, max_batch=1).generate([request])[0].token_ids for request in requests]
    for size in (2, 8):
        together = Engine(net, max_batch=size).generate(requests)
        assert [reply.token_ids for reply in together] == alone
    assert len({len(request.input_ids) for request in requests}) > 1


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough
   and fever.

 COMPARISON:  ___.

 FINDINGS:

 Compared to the prior chest radiograph, the lungs are clear.  There is no
 pleural effusion.  Findings were discussed with Dr. ___ by telephone at 3:15 pm.
 Heart size is unchanged from the previous study.

 IMPRESSION:

 No acute process.
"""


def test_rules_cut_the_findings_out_and_clean_them(tmp_path):
    from llavakit.synthesis.run import synthesize
    from llavakit.systems.llava_rad import sections

    assert list(sections.headings(REPORT)) == [
        "FINAL REPORT",
        "EXAMINATION",
        "INDICATION",
        "COMPARISON",
        "FINDINGS",
        "IMPRESSION",
    ]
    assert sections.reason(REPORT) == "___ year old woman with cough and fever."
    assert sections.cleaned(sections.findings_section(REPORT)) == (
        "The lungs are clear. There is no pleural effusion. Heart size is unchanged."
    )
    assert sections.findings_section(REPORT.replace("FINDINGS", "FINDINGS AND IMPRESSION")) is None
    assert sections.findings_section("IMPRESSION: Findings: none of note.") is None
    assert sections.findings_section("findings:\r\nClear.\r\nImpression: fine") == "Clear."
    assert sections.cleaned("In comparison with the study of ___, there is little change.") == ""
    assert sections.cleaned("No change in the interval. A nodule.") == "No change. A nodule."
    records = [{"id": n, "report": text, "image": "a.png", "view": "PA"} for n, text in enumerate((REPORT, "Clear."))]
    source = write_annotations(tmp_path / "raw.json", records)
    synthesize("findings_by_rules", source, tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(r["id"], r["generate_method"], r["view"]) for r in written] == [(0, "rule-based", "PA")]
    refused = (tmp_path / "out.refused.jsonl").read_text()
    assert "has no findings section of its own" in refused
    counts = prepare("mimic_cxr_findings", tmp_path / "out.json", tmp_path / "train.json")
    assert counts["written"] == 1
    asked = json.loads((tmp_path / "train.json").read_text())[0]["conversations"][0]["value"]
    assert asked.endswith("given the following indication: ___ year old woman with cough and fever.")


def test_a_teacher_is_asked_where_rules_fail_and_may_add_nothing(tmp_path):
    from fake_api import FakeAPI, completion

    from llavakit.synthesis.run import synthesize

    texts = [REPORT, "Clear lungs, no effusion. Impression: fine.", "A nodule of 3 mm. Follow up.", "Nothing to see."]
    source = write_annotations(tmp_path / "raw.json", [{"id": n, "report": text} for n, text in enumerate(texts)])
    replies = {
        "Clear lungs": '{"findings": "Clear lungs, no effusion.", "reason": null}',
        "A nodule": '{"findings": "Large pneumothorax with mediastinal shift."}',
        "Nothing to see": 'Sure: {"findings": null, "reason": null}',
    }
    asked = []

    def answer(body):
        prompt = body["messages"][-1]["content"]
        asked.append(prompt)
        return completion(next(reply for words, reply in replies.items() if words in prompt))

    with FakeAPI(answer) as api:
        synthesize("findings_by_teacher", source, tmp_path / "out.json", teacher="m", base_url=api.url)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(record["id"], record["generate_method"]) for record in written] == [(0, "rule-based"), (1, "teacher")]
    assert written[1]["conversations"][1]["value"] == "Clear lungs, no effusion."
    assert not any("PA AND LAT" in prompt for prompt in asked)
    assert sum("A nodule" in prompt for prompt in asked) == 2  # its words are not the report's, so it is asked again
    refused = [json.loads(line) for line in (tmp_path / "out.refused.jsonl").read_text().splitlines()]
    assert [line["reason"][:30] for line in refused] == [
        "the teacher's replies are not ",
        "the teacher finds no findings ",
    ]


def test_miniature_measures_every_arm():
    from llavakit.systems.llava_rad import miniature

    budget = {"encoder_steps": 2, "steps": 2, "pairs": 8, "held_out": 8}
    values = {name: value for arm in miniature.ARMS for name, value in miniature.one_part(0, arm, **budget).items()}
    assert list(values) == list(miniature.ARMS)
    assert all(0 <= value <= 1 for value in values.values())
    studies = miniature.radiographs(64, torch.Generator().manual_seed(0))
    assert studies.texts == [miniature.report(row) for row in studies.labels.tolist()]
    assert miniature.report([False] * 5) == "no acute findings ."
    for n, name in enumerate(miniature.FINDINGS):
        assert [f"there is {name} ." in text for text in studies.texts] == studies.labels[:, n].tolist()
