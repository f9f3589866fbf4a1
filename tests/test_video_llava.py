"""Video-LLaVA: golden figures, the encoder of video, clips, adapters, published files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from llavakit.checkpoints.convert import convert, save
from llavakit.checkpoints.encoders import encoder_options, read_encoder
from llavakit.checkpoints.opening import build, load_processor, open_checkpoint
from llavakit.errors import CheckpointError, MediaError, UserError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.video_llava.checkpoint import Published
from llavakit.systems.video_llava.encoder import LanguageBindVideo, LanguageBindVideoConfig
from llavakit.systems.video_llava.views import Clip, FloatSquare
from llavakit.views.pixels import pad_to_square
from llavakit.views.plan import MediaSize
from llavakit.vision.geometry import geometry_of

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")

GOLDEN = Path(__file__).parent / "golden" / "video-llava"
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 14,
    "patch_size": 7,
    "hidden_act": "gelu",
}


def encoder(frames: int = 4, **options) -> LanguageBindVideo:
    torch.manual_seed(0)
    return LanguageBindVideo(LanguageBindVideoConfig(**VIT, num_frames=frames, **options)).eval()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


# The encoder


def test_frames_that_are_equal_are_encoded_as_the_picture_where_time_adds_nothing():
    net = encoder()
    with torch.no_grad():
        for layer in net.encoder.layers:
            layer.temporal_embedding.zero_()
            layer.temporal_attn.out_proj.weight.zero_()
            layer.temporal_attn.out_proj.bias.zero_()
        still = CLIPVisionModel(CLIPVisionConfig(**VIT)).eval()
        own = still.state_dict()
        wrapped = "vision_model." * any(name.startswith("vision_model.") for name in own)
        still.load_state_dict(
            {f"{wrapped}{n}": t for n, t in net.state_dict().items() if "temporal" not in n}, strict=False
        )
        image = torch.randn(2, 3, 14, 14)
        clip = image.unsqueeze(2).expand(-1, -1, 4, -1, -1)
        wanted = still(image, output_hidden_states=True).hidden_states[-2]
        found = net.features(clip, -2, "full").unflatten(1, (4, -1))
    for frame in range(4):
        torch.testing.assert_close(found[:, frame], wanted, atol=1e-5, rtol=0)


def test_order_of_frames_matters_through_the_temporal_embedding_alone():
    net, clip = encoder(), torch.randn(1, 3, 4, 14, 14)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        found = net.features(clip, -2, "default").unflatten(1, (4, -1))
        shuffled = net.features(clip[:, :, order], -2, "default").unflatten(1, (4, -1))
        assert (shuffled - found[:, order]).abs().max() > 1e-3
        for layer in net.encoder.layers:
            layer.temporal_embedding.zero_()
        found = net.features(clip, -2, "default").unflatten(1, (4, -1))
        shuffled = net.features(clip[:, :, order], -2, "default").unflatten(1, (4, -1))
    torch.testing.assert_close(shuffled, found[:, order], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("strategy", "grid"), [("full", (8, 1, 5)), ("default", (8, 2, 2))])
def test_a_clip_twice_as_long_is_two_clips_and_its_grid_is_known_beforehand(strategy, grid):
    net, clip = encoder(), torch.randn(2, 3, 8, 14, 14)
    with torch.no_grad():
        found = net.features(clip, [1, -2], strategy)
        halves = [net.features(half, [1, -2], strategy) for half in clip.chunk(2, dim=2)]
    torch.testing.assert_close(found, torch.cat(halves, dim=1), atol=1e-6, rtol=0)
    plan = Clip(frame={"type": "float_square", "size": 14}, frames=4).plan(MediaSize(8, 30, 20))
    geometry = geometry_of(net.config).for_strategy(strategy)
    assert geometry.grid(plan.views[0], strategy == "full") == grid
    assert found.shape == (2, grid[0] * grid[1] * grid[2], 32)


def test_clips_that_do_not_fit_are_one_line():
    net = encoder()
    with pytest.raises(UserError, match="a clip of 6 frames; this encoder takes 4"):
        net.features(torch.zeros(2, 3, 6, 14, 14), -2)
    with pytest.raises(UserError, match="takes clips, not pictures"):
        net.features(torch.zeros(4, 3, 14, 14), -2)
    free = encoder(temporal_attention=False)
    assert free.features(torch.zeros(1, 3, 5, 14, 14), -2).shape == (1, 20, 16)
    assert not any("temporal" in name for name in free.state_dict())


# Views


@pytest.mark.parametrize("size", [(24, 32), (40, 24), (224, 225), (112, 115), (10, 900), (1, 1), (480, 640)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("pad", [False, True])
def test_pixels_equal_those_of_resizing_the_whole_picture_as_floats(size, mode, pad):
    image = picture(*size)
    planner = FloatSquare(mode=mode, pad=pad, ratio=mode == "bilinear")
    (found,) = planner.cut(image, planner.plan(MediaSize(1, *size)))
    whole = pad_to_square(image, planner.background) if pad else image
    tall, wide = planner.resized(whole.height, whole.width)
    values = F.interpolate(torch.from_numpy(planner.normalise(whole))[None], size=(tall, wide), mode=mode)[0]
    top, left = planner.crop(tall, wide)
    np.testing.assert_allclose(found, values[:, top : top + 224, left : left + 224].numpy(), atol=2e-5)


def test_a_strip_of_any_length_costs_little():
    planner = FloatSquare(pad=True)
    (found,) = planner.cut(picture(1, 60_000), planner.plan(MediaSize(1, 1, 60_000)))
    assert found.shape == (3, 224, 224)


def test_a_clip_is_one_view_of_all_frames():
    frames = [picture(20, 30, seed) for seed in range(3)]
    planner = Clip(frame={"type": "float_square", "size": 14, "mode": "bilinear"}, frames=4)
    plan = planner.plan(MediaSize(4, 20, 30))
    (clip,) = planner.cut([*frames, frames[0]], plan)
    assert clip.shape == (3, 4, 14, 14)
    np.testing.assert_array_equal(clip[:, 0], clip[:, 3])
    inner = FloatSquare(size=14, mode="bilinear")
    np.testing.assert_array_equal(clip[:, 1], inner.cut(frames[1], inner.plan(MediaSize(1, 20, 30)))[0])
    mirrored = Clip(frame={"type": "float_square", "size": 14, "mode": "bilinear"}, mirror=True)
    np.testing.assert_array_equal(mirrored.cut([*frames, frames[0]], plan)[0], clip[..., ::-1])
    with pytest.raises(MediaError, match="3 frames; this model takes 4"):
        planner.plan(MediaSize(3, 20, 30))
    assert [planner.fitted(MediaSize(n, 20, 30)).depth for n in (1, 4, 9)] == [4, 4, 12]
    with pytest.raises(UserError, match="one view of a frame"):
        Clip(frame={"type": "anyres", "size": 14}).plan(MediaSize(4, 20, 30))


# LanguageBind's folders


@pytest.fixture
def adapted(tmp_path):
    """A folder of the unmerged form, as the golden case has its weights."""
    config = json.loads((GOLDEN / "lora_merge" / "case.json").read_text())["config"]
    config.pop("targets")
    folder = tmp_path / "LanguageBind_Video"
    folder.mkdir()
    weights = load_file(GOLDEN / "lora_merge" / "weights.safetensors")
    state = {f"vision_model.{name}": tensor for name, tensor in weights.items()}
    state |= {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 2), "logit_scale": torch.ones(1)}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "LanguageBindVideo", "vision_config": config}))
    return folder, weights


def test_adapters_are_merged_while_they_are_read(adapted):
    folder, weights = adapted
    options = encoder_options(folder)
    assert options["model_type"] == "languagebind_video"
    assert options["num_frames"] == 4
    state = dict(read_encoder(folder))
    assert not [name for name in state if "lora" in name or "base_model" in name or "text" in name]
    stem = "encoder.base_model.model.layers.0.temporal_attn.q_proj"
    a, b = (weights[f"{stem}.lora_{half}.default.weight"] for half in "AB")
    wanted = weights[f"{stem}.weight"] + 16 / 4 * b @ a
    torch.testing.assert_close(state["encoder.layers.0.temporal_attn.q_proj.weight"], wanted)
    newer = {name.replace("_proj.weight", "_proj.base_layer.weight"): tensor for name, tensor in weights.items()}
    save_file(newer, folder / "model.safetensors")
    again = read_encoder(folder)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, vision: state.pop(next(n for n in state if "lora_B" in n)), "incomplete: lora_B is missing"),
        (lambda state, vision: vision.update(lora_r=3), "config.json says lora_r 3"),
        (lambda state, vision: vision.update(lora_rank=3), "lora_rank"),
        (lambda state, vision: vision.update(lora_r="x"), "lora_r and lora_alpha are 'x'"),
    ],
)
def test_broken_adapters_are_one_line(adapted, change, message):
    folder, weights = adapted
    raw = json.loads((folder / "config.json").read_text())
    change(weights, raw["vision_config"])
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        encoder_options(folder), dict(read_encoder(folder))


# Published files


@pytest.fixture
def published(tmp_path):
    """The mixed golden batch's weights as a published folder with its encoders' folders beside it."""
    config = json.loads((GOLDEN / "e2e_mixed_batch" / "case.json").read_text())["config"]
    folder, towers = tmp_path / "video-llava", tmp_path / "towers"
    folder.mkdir()
    save_file(load_file(GOLDEN / "e2e_mixed_batch" / "weights.safetensors"), folder / "model.safetensors")
    for name, kind, temporal in (
        ("LanguageBind_Image", "LanguageBindImage", False),
        ("LanguageBind_Video_merge", "LanguageBindVideo", True),
    ):
        (towers / name).mkdir(parents=True)
        vision = config["vision"] | {"add_time_attn": temporal}
        (towers / name / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": vision}))
    raw = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], **config["language_model"]}
    raw |= {"mm_image_tower": "LanguageBind/LanguageBind_Image", "image_aspect_ratio": "pad", "use_mm_proj": True}
    raw |= {"mm_video_tower": "LanguageBind/LanguageBind_Video_merge", "mm_use_im_start_end": False}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, towers


def test_published_layout_round_trips(published, tmp_path):
    folder, towers = published
    checkpoint = open_checkpoint(folder, vision_tower=towers)
    config = checkpoint.config
    assert config.system == "video-llava"
    assert checkpoint.layout.startswith("video-llava")
    assert config.media["video"]["views"]["frames"] == 8
    assert config.media["image"]["views"]["pad"]
    convert(folder, tmp_path / "native", to="llavakit", vision_tower=towers)
    convert(tmp_path / "native", tmp_path / "again", to="original")
    source, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.equal(written[name], source[name]) for name in source)
    back = open_checkpoint(tmp_path / "again")  # brings the configurations of encoders that nobody published
    assert back.config.media == config.media
    assert back.config.extra_encoders == config.extra_encoders
    one, other = (dict(build(own).named_parameters()) for own in (checkpoint, back))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_names_that_lead_nowhere_and_other_widths_are_one_line(published):
    folder, towers = published
    video = towers / "LanguageBind_Video_merge" / "config.json"
    wide = json.loads(video.read_text())
    wide["vision_config"]["hidden_size"] = 32
    video.write_text(json.dumps(wide))
    with pytest.raises(CheckpointError, match="16 and 32 channels"):
        open_checkpoint(folder, vision_tower=towers)
    video.parent.rename(towers / "LanguageBind_Video_other")
    raw = json.loads((folder / "config.json").read_text()) | {"mm_video_tower": "somebody/else"}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="mm_video_tower 'somebody/else' is neither a local folder"):
        open_checkpoint(folder, vision_tower=towers)


# Published scale


def test_published_shapes_and_counts():
    from llavakit.training.build import build_meta
    from llavakit.training.recipe import load_recipe

    net = build_meta(load_recipe(get_system("video-llava").recipe))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(net.model.vision_tower) == 303_179_776
    assert count(net.model.video_tower) == 404_187_136
    assert count(net.model.multi_modal_projector) == 20_979_712
    assert count(net.model.language_model) + count(net.lm_head) == 6_738_415_616
    assert net.model.media.count("image", MediaSize(1, 480, 640)) == 256
    assert net.model.media.count("video", MediaSize(8, 480, 640)) == 2056
    shapes = {name: tuple(t.shape) for name, t in Published().write_state(net.config, net.state_dict())}
    assert shapes["model.image_tower.image_tower.embeddings.position_embedding.weight"] == (257, 1024)
    assert shapes["model.video_tower.video_tower.encoder.layers.23.temporal_embedding"] == (1, 8, 1024)
    assert shapes["model.video_tower.video_tower.encoder.layers.0.temporal_attn.out_proj.weight"] == (1024, 1024)
    assert shapes["model.mm_projector.2.weight"] == (4096, 4096)
    assert Published().write_config(net.config)["mm_video_tower"] == "LanguageBind/LanguageBind_Video_merge"


def test_cost_is_that_of_the_spec():
    rows = {(row.group, row.name, row.unit): row.value for row in get_system("video-llava").load("cost")().rows}
    encoders = {
        ("one image", "FLOPs"): 162_023_964_672,
        ("a clip of 8 frames", "FLOPs"): 1_711_736_094_720,
        ("attention over time in it", "FLOPs"): 415_544_377_344,
        ("attention over time in it", "parameters"): 101_007_360,
    }
    for key, value in encoders.items():
        assert rows[("encoders", *key)] == pytest.approx(value, rel=1e-3)
    for group, projector, prefill in (
        ("an image", 10_737_418_240, 3_350_336_634_880),
        ("a clip of 8 frames", 86_234_890_240, 28_845_832_929_280),
    ):
        assert rows[group, "projector", "FLOPs"] == projector
        assert rows[group, "prefill, logits of the last position", "FLOPs"] == pytest.approx(prefill, rel=1e-3)
    assert rows["a clip of 8 frames", "cache, 16 bits a value", "bytes"] == 524_288 * 2056


# Judged answers


def test_published_question_files_are_asked_and_judged(tmp_path):
    from llavakit.evaluation.judges import Judge
    from llavakit.evaluation.score import benchmark, score
    from llavakit.systems.video_llava.parity_text import Canned

    for name in ("v_a1.mp4", "b2.avi"):
        (tmp_path / name).touch()
    asked = [{"video_name": name, "question": f"who is {name}?", "question_id": f"{name}_0"} for name in ("a1", "b2")]
    (tmp_path / "test_q.json").write_text(json.dumps(asked))
    (tmp_path / "test_a.json").write_text(json.dumps([{"answer": "a man"}, {"answer": 2}]))
    questions = benchmark("video_chatgpt_qa").questions(tmp_path / "test_q.json")
    assert [Path(own.media[0]["video"]).name for own in questions] == ["v_a1.mp4", "b2.avi"]
    predictions = tmp_path / "p.jsonl"
    predictions.write_text(
        "".join(json.dumps({"question_id": q["question_id"], "text": "x"}) + "\n" for q in asked[::-1])
    )
    judge = Canned("{'pred': 'yes', 'score': 4.8}")
    gold, said = tmp_path / "test_a.json", tmp_path / "said.json"
    found = score("video_chatgpt_qa", predictions, gold, judge=Judge(judge), judgements=said)["metrics"]
    assert {name: found[name] for name in ("accuracy", "score", "count", "unreadable")} == {
        "accuracy": 100.0,
        "score": 4.0,  # cut, as published
        "count": 2,
        "unreadable": 0,
    }
    assert {"who is b2?\nCorrect Answer: 2\n" in told[1]["content"] for told in judge.told} == {True, False}
    assert score("video_chatgpt_qa", said)["metrics"]["score"] == 4.0
    lost = Judge(Canned("I cannot say"))
    found = score("video_chatgpt_qa", predictions, gold, judge=lost, cache=None)["metrics"]
    assert (found["count"], found["unreadable"], found["accuracy"]) == (0, 2, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "test_a.json").write_text('[{"answer": "x"}]'), "holds 1 answers for the 2 questions"),
        (lambda f: (f / "test_q.json").unlink(), "no test_q.json beside it"),
        (lambda f: (f / "p.jsonl").write_text('{"question_id": 0, "text": "x"}\n'), "'1' has no prediction"),
        (lambda f: (f / "p.jsonl").write_text('{"question_id": 7, "text": "x"}\n'), "'7' is not among the questions"),
        (lambda f: (f / "p.jsonl").write_text('{"id": 1, "answer": "x", "pred": "y"}\n'), "question"),
    ],
)
def test_files_that_do_not_fit_are_one_line(tmp_path, change, message):
    from llavakit.evaluation.score import score

    rows = [{"video_name": "v", "question": "q?", "question_id": number} for number in range(2)]
    (tmp_path / "test_q.json").write_text(json.dumps(rows))
    (tmp_path / "test_a.json").write_text(json.dumps([{"answer": "x"}, {"answer": "y"}]))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"question_id": n, "text": "x"}) + "\n" for n in range(2)))
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        score("video_chatgpt_qa", tmp_path / "p.jsonl", tmp_path / "test_a.json", judge="http://127.0.0.1:9/v1#m")


# transformers' class


@pytest.fixture
def transformers_folder(tmp_path):
    """A folder that transformers itself wrote."""
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 24, "intermediate_size": 32}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    config = VideoLlavaConfig(
        text_config=text,
        vision_config={"model_type": "clip_vision_model", **VIT},
        image_token_index=60,
        video_token_index=61,
    )
    torch.manual_seed(0)
    net = VideoLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.15)
    net.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", net


def mixed_inputs(image_token: int, video_token: int, frames: int = 3):
    """A picture and a clip in one prompt: ids, picture [1, 3, ...], clip [1, frames, 3, ...]."""
    generator = torch.Generator().manual_seed(1)
    ids = [1, 5, *[image_token] * 4, 7, *[video_token] * (5 * frames), 9, 11]
    image, clip = torch.randn(1, 3, 14, 14, generator=generator), torch.randn(1, frames, 3, 14, 14, generator=generator)
    return torch.tensor([ids]), image, clip


def our_logits(net, image, clip, ids):
    with torch.no_grad():
        return net(
            input_ids=ids,
            pixel_values=[image[0], clip[0].transpose(0, 1)],
            visual_sizes=torch.tensor([[1, 14, 14], [clip.shape[1], 14, 14]]),
            visual_modalities=torch.tensor([0, 1]),
        ).logits


def test_transformers_own_files_answer_alike_and_go_back(transformers_folder, tmp_path):
    from transformers import VideoLlavaForConditionalGeneration

    folder, theirs = transformers_folder
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.system == "video-llava"
    assert not checkpoint.config.encoder_config("video_tower")[0].temporal_attention
    ids, image, clip = mixed_inputs(60, 61)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=image, pixel_values_videos=clip).logits
    same = ids.masked_fill(ids == 61, 60)
    torch.testing.assert_close(our_logits(build(checkpoint), image, clip, same), wanted, atol=1e-5, rtol=0)
    convert(folder, tmp_path / "native", to="llavakit")
    convert(tmp_path / "native", tmp_path / "again", to="hf")
    again, report = VideoLlavaForConditionalGeneration.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = again.eval()(input_ids=ids, pixel_values=image, pixel_values_videos=clip).logits
    torch.testing.assert_close(found[..., :64], wanted, atol=1e-6, rtol=0)
    convert(tmp_path / "native", tmp_path / "original", to="original")
    back = open_checkpoint(tmp_path / "original")
    assert not back.config.encoder_config("video_tower")[0].temporal_attention
    same = ids.masked_fill((ids == 60) | (ids == 61), back.config.image_token_id)
    torch.testing.assert_close(our_logits(build(back), image, clip, same), wanted, atol=1e-5, rtol=0)
    assert back.config.media["image"]["views"]["type"] == "square"  # transformers' processor, not the authors' code


def test_an_export_with_tokenizer_writes_prompts_alike(transformers_folder, tmp_path):
    from export_cases import tokenizer_of

    folder, _ = transformers_folder
    checkpoint = open_checkpoint(folder)
    tokenizer = tokenizer_of("llama")
    fields = checkpoint.config.to_dict() | {"image_token_id": len(tokenizer), "system": "video-llava"}
    fields["text_config"] |= {"vocab_size": len(tokenizer)}
    config = LlavakitConfig.from_dict(fields)
    net = LlavakitForConditionalGeneration(config)
    processor = LlavakitProcessor.from_config(config, tokenizer)
    save(net.state_dict(), config, processor, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "export", to="hf")
    back = open_checkpoint(tmp_path / "export")
    assert back.config.template == "video_llava"
    again = load_processor(back)
    parts = [{"type": "video", "video": [picture(20, 30)] * 8}, {"type": "text", "text": "What moves?"}]
    mine, theirs = (
        own.encode([{"role": "user", "content": parts}], add_generation_prompt=True) for own in (processor, again)
    )
    assert mine["input_ids"] == theirs["input_ids"]
    (tmp_path / "export" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'video' %}{{ '<video>' }}"
        "{% elif p['type'] == 'image' %}{{ '<image>' }}{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    own = load_processor(open_checkpoint(tmp_path / "export"))
    parts[1] = {"type": "text", "text": "What <video> moves?"}
    found = own.encode([{"role": "user", "content": parts}], add_generation_prompt=True)
    assert found["input_ids"].count(own.image_token_id) == 8 * 5
    raw = json.loads((tmp_path / "export" / "processor_config.json").read_text())
    raw["video_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    (tmp_path / "export" / "processor_config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="image_mean"):
        open_checkpoint(tmp_path / "export")


def test_weights_of_time_are_not_lost_in_silence(published, tmp_path):
    folder, towers = published
    with pytest.raises(UserError, match="temporal_attention: transformers' class does not look along time"):
        convert(folder, tmp_path / "export", to="hf", vision_tower=towers)
    video = towers / "LanguageBind_Video_merge" / "config.json"
    raw = json.loads(video.read_text())
    raw["vision_config"]["add_time_attn"] = False
    video.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="temporal_attn"):
        build(open_checkpoint(folder, vision_tower=towers))


# Records that do not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"value": "<video><video>\nQ?"},
            "train.jsonl:2: conversations: 2 <video> in the text, but 1 media in the record",
        ),
        ({"value": "Q?"}, "train.jsonl:2: conversations: 0 <image> in the text, but 1 media in the record"),
        (
            {"value": "<video>\n<image>\nQ?"},
            "train.jsonl:2: conversations: 2 <image> and <video> in the text, but 1 media",
        ),
        ({"video": "short"}, "train.jsonl:2: video: .*short: has 3 frames, at least 8 are wanted"),
    ],
)
def test_records_that_do_not_fit_are_one_line_or_left_out(tmp_path, change, message):
    from export_cases import tokenizer_of

    from llavakit.data.mixture import Mixture, read_specs
    from llavakit.data.records import BadRecords
    from llavakit.training.dataset import Samples

    for name, count in (("long", 9), ("short", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            picture(20, 30, number).save(tmp_path / name / f"{number}.png")
    rows = [{"id": n, "video": "long", "conversations": turns("<video>\nQ?")} for n in range(2)]
    rows[1] |= {"video": change.get("video", "long"), "conversations": turns(change.get("value", "<video>\nQ?"))}
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = build_config_of(len(tokenizer_of("llama")))
    sampling = {"type": "uniform", "frames": 8, "min_frames": 8}
    processor = LlavakitProcessor.from_config(config, tokenizer_of("llama"), sampling=sampling)

    def samples(**options):
        specs = read_specs({"path": str(file), "media_root": str(tmp_path)})
        return Samples(Mixture(specs, seed=0), processor, **options)

    good = samples()
    assert good[0]["pixel_values"][0].shape == (3, 8, 14, 14)
    with pytest.raises(UserError, match=message) as caught:
        good[1]
    assert "\n" not in str(caught.value)
    bad = BadRecords(tmp_path / "bad.jsonl")
    skipping = samples(on_bad_record="skip", bad=bad)
    assert torch.equal(skipping[1]["input_ids"], good[0]["input_ids"])
    assert "train.jsonl" in (tmp_path / "bad.jsonl").read_text()


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A."}]


def build_config_of(rows: int) -> LlavakitConfig:
    """Video-LLaVA, tiny, with 14-pixel views."""
    vit = {"model_type": "clip_vision_model", **VIT}
    frame = {"type": "float_square", "size": 14}
    tower = {"config": VIT | {"model_type": "languagebind_video"}, "layer": -2, "strategy": "full"}
    return LlavakitConfig(
        text_config={"model_type": "llama", "vocab_size": rows, "hidden_size": 24, "num_attention_heads": 4}
        | {"intermediate_size": 32, "num_hidden_layers": 2},
        vision_config=vit,
        extra_encoders={"video_tower": tower},
        media={
            "image": {"views": frame},
            "video": {"encoder": "video_tower", "views": {"type": "clip", "frames": 8, "frame": frame}},
        },
        image_token_id=rows,
        template="video_llava",
        system="video-llava",
    )


# Mixed conversations and batches


def test_pictures_clips_and_text_decode_together_as_alone():
    from export_cases import tokenizer_of

    from llavakit.generation.engine import Engine
    from llavakit.generation.request import Request, SamplingParams

    tokenizer = tokenizer_of("llama")
    config = build_config_of(len(tokenizer))
    torch.manual_seed(0)
    net = LlavakitForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    processor = LlavakitProcessor.from_config(config, tokenizer)
    text = {"type": "text", "text": "What is it?"}
    clip = {"type": "video", "video": [picture(20, 30, seed) for seed in range(8)]}
    shown = [
        [clip, {"type": "image", "image": picture(30, 20)}, text],
        [{"type": "image", "image": picture(9, 9)}, text],
    ]
    samples = [
        processor.encode([{"role": "user", "content": parts}], add_generation_prompt=True)
        for parts in (*shown, [clip, text], [text])
    ]

    def request(sample):
        views = sample["pixel_values"] or None
        media = {name: torch.tensor(sample[name]) if views else None for name in ("visual_sizes", "visual_modalities")}
        sampling = SamplingParams(max_new_tokens=4, eos_token_ids=())
        return Request(input_ids=torch.tensor(sample["input_ids"]), pixel_values=views, sampling=sampling, **media)

    together = Engine(net, max_batch=4).generate([request(sample) for sample in samples])
    alone = [Engine(net, max_batch=1).generate([request(sample)])[0] for sample in samples]
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]


def test_the_miniature_measures_every_arm():
    from llavakit.systems.video_llava.miniature import one_seed

    found = one_seed(0, align_steps=3, steps=3, held_out=20)
    assert len(found) == 15
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize(
    ("text", "images", "said"),
    [
        ("<image>" * 18 + "\nWhich? ", 16, "<image>" * 16 + "\nWhich?"),
        ("<video>" + "<image>" * 17 + "\nWhich?", 16, "<video>" + "<image>" * 16 + "\nWhich?"),
        ("See <image>" + "<image>" * 17, 18, None),
        ("<image> " * 18, 18, None),
        ("<image> " * 18 + "Which? ", 18, None),
        ("<image>" * 16 + " ", 16, None),
    ],
)
def test_a_long_run_of_images_is_cut_as_published_with_a_note(text, images, said):
    from llavakit.conversation.encode import encode
    from llavakit.conversation.messages import from_llava
    from llavakit.proof.entries import byte_tokenizer

    count = text.count("<image>")
    record = {"conversations": turns(text), "image": [f"{n}.png" for n in range(count)]}
    record |= {"video": "v.mp4"} if "<video>" in text else {}
    found = encode(from_llava(record), "video_llava_training", byte_tokenizer())
    names = [part["image"] for part in found.media if part["type"] == "image"]
    assert len(names) == images
    assert names == sorted(names, key=lambda name: int(name.split(".")[0]))
    assert (names[0], names[-1]) == ("0.png", f"{count - 1}.png")
    assert bool(found.notes) == (said is not None)
    question = (said or (text.rstrip() if text.startswith("<image> ") else text)).replace("<video>", "<image>")
    assert f"USER: {question} ASSISTANT: A." in found.text
