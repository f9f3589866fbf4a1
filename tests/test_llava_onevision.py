"""LLaVA-OneVision: golden figures, both checkpoint layouts, media of all kinds, training steps, claim and cost."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.conversation.template import get_template
from llavakit.conversation.timing import time_instruction, with_time_instruction
from llavakit.data.collate import Collator
from llavakit.errors import CheckpointError, UserError
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import MODALITIES, MediaSpec
from llavakit.proof.golden import find_cases, run_case
from llavakit.systems.llava_onevision.checkpoint import OnevisionLayout, media_of, settings_of
from llavakit.systems.llava_onevision.hf_checkpoint import OnevisionTransformersLayout
from llavakit.views.plan import MediaSize

GOLDEN = Path(__file__).parent / "golden" / "llava-onevision"
TINY = json.loads((GOLDEN / "e2e_logits" / "case.json").read_text())["config"]
SIGLIP = "google/siglip-so400m-patch14-384"
SIZES = {  # published language models: hidden, inner, layers, heads, key-value heads, rows, tied
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
RELEASED = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    "mm_vision_tower": SIGLIP,
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "mm_spatial_pool_mode": "bilinear",
    "mm_vision_select_layer": -2,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
}


def released(size: str, **fields):
    """A published config.json."""
    hidden, inner, layers, heads, kv, rows, tied = SIZES[size]
    return RELEASED | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        **fields,
    }


def write_classic(folder: Path, **fields) -> Path:
    """A tiny checkpoint in the authors' layout, with the weights and settings of the golden end-to-end case."""
    folder.mkdir()
    encoder = folder.parent / "siglip-tiny"
    encoder.mkdir(exist_ok=True)
    (encoder / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model", **TINY["vision"]}))
    raw = RELEASED | TINY["model_config"] | {"mm_vision_tower": str(encoder), "eos_token_id": 266, **fields}
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copy(GOLDEN / "e2e_logits" / "weights.safetensors", folder / "model.safetensors")
    shutil.copy(GOLDEN / "preprocess" / "tokenizer.json", folder)
    specials = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    more = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **specials, **more})
    )
    return folder


@pytest.fixture(scope="module")
def classic(tmp_path_factory):
    return write_classic(tmp_path_factory.mktemp("onevision") / "classic")


@pytest.fixture(scope="module")
def chat(classic):
    return llavakit.load(classic)


@pytest.fixture(scope="module")
def exported(classic):
    """The same checkpoint in transformers' layout, and transformers' model of it."""
    from transformers import LlavaOnevisionForConditionalGeneration

    folder = classic.parent / "hf"
    convert(classic, folder, to="hf")
    return folder, LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def user(*parts, answer: str | None = None):
    """A conversation of one user turn; strings are text, pictures images, lists of pictures videos."""

    def part(item):
        if isinstance(item, str):
            return {"type": "text", "text": item}
        kind = "video" if isinstance(item, list) else "image"
        return {"type": kind, kind: item}

    turns = [{"role": "user", "content": [part(item) for item in parts]}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


ONE = user(picture(40, 23), "\nWhat is it?", answer="A cat.")
BUDGETED = user(picture(92, 90), "\nAnd this?", answer="A dog.")
SEVERAL = user(picture(40, 23, 1), picture(17, 30, 2), "\nWhich is larger?", answer="The second.")
VIDEO = user([picture(19, 13, seed) for seed in range(5)], "\nWhat happens?", answer="Nothing.")
TEXT = user("Hi there", answer="Hello\nthere")


def forward(model, sample, **options):
    """Logits [length, vocabulary] of one sample."""
    batch = Collator(0)([sample])
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch, **options).logits[0]


# Golden figures


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


# Checkpoints


def test_a_published_checkpoint_gives_the_golden_logits(chat):
    request = json.loads((GOLDEN / "e2e_logits" / "inputs.json").read_text())["single_anyres"]
    pixels = load_file(GOLDEN / "e2e_logits" / "inputs.safetensors")["single_anyres/img0"]
    wanted = load_file(GOLDEN / "e2e_logits" / "outputs.safetensors")["single_anyres/logits"]
    (width, height), size = request["image_sizes"][0], chat.model.model.media
    token = chat.config.image_token_id
    count = size.count("image", MediaSize(1, height, width))
    ids = [token if i == -200 else i for i in request["input_ids"][0] for _ in range(count if i == -200 else 1)]
    with torch.no_grad():
        logits = chat.model(
            input_ids=torch.tensor([ids]), pixel_values=pixels, visual_sizes=torch.tensor([[1, height, width]])
        ).logits
    torch.testing.assert_close(logits[:, request["keep"][0]], wanted, atol=2e-4, rtol=1e-3)


def test_the_placeholder_gets_its_row_among_the_spare_ones(chat):
    assert chat.config.image_token_id == 267 < chat.config.text_config.vocab_size == 272
    assert chat.processor.sampling == {"type": "uniform", "frames": 32}


def test_classic_and_native_layouts_hold_the_same(classic, tmp_path):
    convert(classic, tmp_path / "native", to="llavakit")
    convert(tmp_path / "native", tmp_path / "again", to="original")
    source, written = load_file(classic / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.equal(written[name], source[name]) for name in source)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (classic, tmp_path / "again"))
    for key in (*RELEASED, *TINY["model_config"]):
        if key not in ("mm_vision_tower", "model_type", "max_position_embeddings", "tokenizer_model_max_length"):
            assert new[key] == old[key], key
    assert new["model_type"] == "llava_qwen"
    again = open_checkpoint(tmp_path / "again", vision_tower=classic.parent / "siglip-tiny")
    assert again.config.media == open_checkpoint(classic).config.media


def transformers_inputs(model, sample):
    """Inputs of transformers' class from a sample of ours: its placeholders, (height, width), padded views."""
    ids, kinds = torch.tensor([sample["input_ids"]]), [MODALITIES[kind] for kind in sample["visual_modalities"]]
    inputs = {"attention_mask": torch.ones_like(ids)}
    if kinds == ["video"]:
        ids = ids.masked_fill(ids == model.config.image_token_id, model.config.video_token_id)
        inputs["pixel_values_videos"] = torch.stack(sample["pixel_values"])[None]
    elif kinds:
        views, several = sample["pixel_values"], len(kinds) > 1
        inputs["pixel_values"] = torch.stack(views)[:, None] if several else torch.stack(views)[None]
        inputs["image_sizes"] = torch.tensor([size[1:] for size in sample["visual_sizes"]])
        inputs["batch_num_images"] = torch.tensor([len(kinds)])
    return {"input_ids": ids, **inputs}


@pytest.mark.parametrize(
    "messages", [ONE, BUDGETED, SEVERAL, VIDEO, TEXT], ids=["one", "budgeted", "several", "video", "text"]
)
def test_transformers_computes_the_same_from_the_export(chat, exported, messages):
    sample = chat.processor.encode(messages)
    ours = forward(chat.model, sample)
    with torch.no_grad():
        theirs = exported[1](**transformers_inputs(exported[1], sample)).logits[0]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_transformers_files_come_back(chat, exported, tmp_path):
    folder, theirs = exported
    ours = llavakit.load(folder)
    assert ours.config.media["image"]["arrange"]["rounding"] == "hf"
    theirs.save_pretrained(tmp_path / "saved")
    resaved = build(open_checkpoint(tmp_path / "saved"))
    for messages in (ONE, SEVERAL, VIDEO):
        sample = ours.processor.encode(messages)
        logits = forward(ours.model, sample)
        assert torch.equal(logits, forward(chat.model, chat.processor.encode(messages)))
        assert torch.equal(logits, forward(resaved, sample))
    convert(folder, tmp_path / "classic", to="original")
    source, written = (
        load_file(place / "model.safetensors") for place in (folder.parent / "classic", tmp_path / "classic")
    )
    assert set(written) == set(source)
    assert all(torch.equal(written[name], source[name]) for name in source)


def test_exported_preprocessing_gives_the_same_pixels(chat, exported):
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    theirs = AutoImageProcessor.from_pretrained(exported[0])
    for image in (picture(40, 23), picture(21, 90), picture(16, 16)):
        mine = torch.stack(chat.processor.encode(user(image, "?"))["pixel_values"])
        wanted = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(mine, wanted)
    pair = [picture(40, 23), picture(17, 30)]
    mine = torch.stack(chat.processor.encode(user(*pair, "?"))["pixel_values"])
    assert torch.equal(mine, theirs([pair], return_tensors="pt")["pixel_values"].flatten(0, 1)[: len(mine)])
    tokenizer = AutoTokenizer.from_pretrained(exported[0])
    assert tokenizer.convert_tokens_to_ids(["<image>", "<video>"]) == [267, 268]


@pytest.mark.parametrize(
    "messages",
    [
        ONE,
        SEVERAL,
        VIDEO,
        TEXT,
        user("Look at ", picture(8, 8), " now"),
        [{"role": "system", "content": "Be brief."}, *ONE],
    ],
    ids=["one", "several", "video", "text", "moved", "system"],
)
def test_exported_template_writes_the_same_prompt(exported, messages):
    from transformers import AutoTokenizer

    from llavakit.conversation.messages import normalise

    tokenizer = AutoTokenizer.from_pretrained(exported[0])
    template = (exported[0] / "chat_template.jinja").read_text()
    theirs = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    ours, _ = get_template("qwen_1_5").render(normalise(messages))
    assert theirs.replace("<video>", "<image>") == ours


def test_a_vocabulary_without_spare_rows_grows_on_export(classic, tmp_path):
    from transformers import LlavaOnevisionForConditionalGeneration

    narrow = write_classic(tmp_path / "narrow", vocab_size=267)
    tensors = load_file(narrow / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:267].clone()
    save_file(tensors, narrow / "model.safetensors")
    convert(narrow, tmp_path / "hf", to="hf")
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.text_config.vocab_size == 320
    ours = llavakit.load(narrow)
    sample = ours.processor.encode(ONE)
    with torch.no_grad():
        logits = theirs(**transformers_inputs(theirs, sample)).logits[0, :, :267]
    torch.testing.assert_close(logits, forward(ours.model, sample), atol=1e-5, rtol=1e-5)


def test_files_of_the_first_stage_join_language_model_and_tower(classic, tmp_path):
    """The encoder's own folder still holds the layer that is deleted; the newline vector starts at random."""
    tensors = load_file(classic / "model.safetensors")
    encoder = tmp_path / "siglip"
    encoder.mkdir()
    own = {n.split("vision_tower.vision_tower.")[1]: t for n, t in tensors.items() if "vision_tower" in n}
    own |= {n.replace("layers.1.", "layers.2."): t + 1 for n, t in own.items() if "layers.1." in n}
    save_file(own | {"vision_model.head.probe": torch.zeros(1, 1, 24)}, encoder / "model.safetensors")
    (encoder / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model", **TINY["vision"]}))
    first = write_classic(tmp_path / "first")
    (first / "model.safetensors").unlink()
    torch.save({n: t for n, t in tensors.items() if "mm_projector" in n}, first / "mm_projector.bin")
    base = tmp_path / "base"
    base.mkdir()
    language = {n: t for n, t in tensors.items() if not any(w in n for w in ("mm_", "vision_tower", "newline"))}
    save_file(language, base / "model.safetensors")
    model = build(open_checkpoint(first, base=base, vision_tower=encoder))
    whole = build(open_checkpoint(classic))
    assert model.config.vision_config.num_hidden_layers == 2
    assert 0 < model.model.image_newline.std().item() < 0.4
    model.model.image_newline.data.copy_(whole.model.image_newline)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("connector", ["mlp2x_res2x_gelu", "linear", "mlp3x_gelu"])
def test_every_published_connector_name_survives_the_round_trip(connector):
    raw = released("0.5B", mm_projector_type=connector, hidden_size=32, num_hidden_layers=1, intermediate_size=8)
    layout = OnevisionLayout()
    config = layout.read_config(raw, {})
    with torch.device("meta"):
        names = set(LlavakitForConditionalGeneration(config).state_dict())
    own = {name: torch.zeros(1) for name in names}
    written = dict(layout.write_state(config, own))
    assert layout.write_config(config)["mm_projector_type"] == connector
    assert "lm_head.weight" not in written  # tied
    from llavakit.checkpoints.files import LazyState
    from llavakit.checkpoints.layouts import rename_with

    state = LazyState({name: (lambda t=t: t) for name, t in written.items()}, {})
    state = layout.drop_unused(config, state.renamed(rename_with(layout.renames_in())))
    assert set(state) == names - {"lm_head.weight"}


@pytest.mark.parametrize("size", SIZES)
def test_published_shapes(size):
    config = OnevisionLayout().read_config(released(size), {})
    with torch.device("meta"):
        model = LlavakitForConditionalGeneration(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    head = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    expected = {
        "0.5B": (1_836_800, 494_032_768),
        "7B": (16_980_992, 7_615_616_512),
        "72B": (76_562_432, 72_706_203_648),
    }[size]
    assert counts["vision_tower"] == 397_747_744
    assert (counts["multi_modal_projector"], counts["language_model"] + head) == expected
    written = OnevisionLayout().write_config(config)
    assert written["mm_vision_tower"] == SIGLIP
    assert len(written["image_grid_pinpoints"]) == 36
    published = {name for name, _ in OnevisionLayout().write_state(config, model.state_dict())}
    assert ("lm_head.weight" in published) is (size != "0.5B")
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.25.mlp.fc2.weight" in published
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.26.mlp.fc2.weight" not in published
    assert OnevisionTransformersLayout().write_config(config)["vision_aspect_ratio"] == "anyres_max_9"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres' is not supported"),
        ({"mm_newline_position": "everywhere"}, "mm_newline_position 'everywhere' is unknown"),
        ({"mm_projector_type": "mlp2x_relu"}, "mm_projector_type 'mlp2x_relu' is unknown"),
        ({"add_faster_video": True}, "add_faster_video is on"),
    ],
)
def test_unknown_settings_are_one_clear_line(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_classic(tmp_path / "classic", **fields))


@pytest.mark.parametrize(
    "settings",
    [
        {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_4"},
        {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "mm_newline_position": "grid"},
        {"mm_patch_merge_type": "spatial_maxpool2x2", "image_aspect_ratio": "anyres"},
        {"mm_patch_merge_type": "spatial_unpad_nobase", "image_aspect_ratio": "anyres_max_9"},
        {"mm_patch_merge_type": "flat", "image_aspect_ratio": "pad", "mm_spatial_pool_mode": "average"},
    ],
    ids=lambda settings: settings["mm_patch_merge_type"],
)
def test_settings_and_media_are_inverses(settings):
    media = media_of(settings, 384)
    assert media_of(settings_of(media), 384) == media
    assert settings_of({**media, "image": {"views": {"type": "slices"}}}) is None


# Media


def spec_of(**options) -> MediaSpec:
    config = OnevisionLayout().read_config(released("0.5B"), {})
    config.media = media_of(RELEASED, 384, **options)
    return MediaSpec(config)


def test_token_counts_of_every_kind_of_medium():
    spec = spec_of()
    assert spec.count("image", MediaSize(1, 384, 384)) == 1485
    assert spec.count("image", MediaSize(1, 2304, 2304)) == 7371
    assert spec.count("image", MediaSize(1, 1362, 1123)) == 8765  # the most there can be
    assert spec.count("image", MediaSize(1, 1, 10_000)) > 0
    assert spec.count("multi_image", MediaSize(1, 1362, 1123)) == 730
    assert spec_of(single_newline=False).count("multi_image", MediaSize(1, 5, 5)) == 729
    assert spec.count("video", MediaSize(32, 720, 1280)) == 32 * 196 + 1


@pytest.mark.parametrize("rounding", ["int", "hf"])
def test_counts_equal_tokens_and_transformers_where_it_rounds_alike(rounding, exported):
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor

    theirs = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    theirs.image_processor = LlavaOnevisionImageProcessor()
    theirs.num_image_tokens, theirs.vision_aspect_ratio = 729, "anyres_max_9"
    spec = spec_of(rounding=rounding)
    route = spec.route("image")
    pick = random.Random(0)
    sizes = [(603, 1809), (1872, 832), *((pick.randint(1, 3000), pick.randint(1, 3000)) for _ in range(300))]
    differing = []
    for number, (width, height) in enumerate(sizes):
        size = MediaSize(1, height, width)
        count = spec.count("image", size)
        if count != theirs._get_number_of_features(height, width, 384, 384):
            differing.append((width, height))
        if number < 8:
            plan = spec.plan("image", size)
            grids = route.token_grids(plan)
            tokens = [torch.zeros(729, 1) for _ in grids]
            assert len(route.arrangement.arrange(plan, grids, tokens, torch.ones(1))) == count
    assert differing == ([] if rounding == "hf" else [(603, 1809), (1872, 832)])


def test_mirrored_images_have_transposed_grids():
    spec = spec_of()
    for width, height in ((1000, 300), (1920, 1080), (385, 384)):
        wide, tall = (spec.plan("image", MediaSize(1, h, w)) for w, h in ((width, height), (height, width)))
        assert (wide.rows, wide.cols) == (tall.cols, tall.rows)


def test_the_last_norm_is_not_read_and_a_further_layer_would_be(chat):
    sample = chat.processor.encode(ONE)
    before = forward(chat.model, sample)
    model = copy.deepcopy(chat.model)
    torch.nn.init.normal_(model.model.vision_tower.post_layernorm.weight)
    assert torch.equal(forward(model, sample), before)
    model.model.vision_tower.encoder.layers.append(model.model.vision_tower.encoder.layers[0])
    assert (forward(model, sample) - before).abs().max() > 1e-3


def test_a_mixed_batch_equals_its_samples_alone(chat):
    samples = [chat.processor.encode(messages) for messages in (ONE, SEVERAL, VIDEO, TEXT, BUDGETED)]
    batch = Collator(0)(samples)
    assert sorted(set(batch["visual_modalities"].tolist())) == [
        MODALITIES.index(k) for k in ("image", "video", "multi_image")
    ]
    with torch.no_grad():
        together = chat.model(**batch).logits
    for row, sample in zip(together, samples, strict=True):
        alone = forward(chat.model, sample)
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=1e-5)
    packed = Collator(0, 512, packing=True)(samples)
    packed.pop("labels")
    with torch.no_grad():
        logits = chat.model(**packed).logits
    found = [
        logits[row, start:] for row, start in zip(*(packed["position_ids"] == 0).nonzero(as_tuple=True), strict=True)
    ]
    for sample in samples:
        alone = forward(chat.model, sample)
        assert any(torch.allclose(own[: len(alone)], alone, atol=1e-4) for own in found if len(own) >= len(alone))


def write_clip(path: Path, frames: int = 24, rate: int = 8) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(frames):
            pixels = np.full((32, 48, 3), 10 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_a_clip_from_a_file_is_answered_and_sampling_can_be_configured(classic, tmp_path):
    clip = str(write_clip(tmp_path / "clip.mp4"))
    messages = user("What happens?")
    messages[0]["content"].insert(0, {"type": "video", "video": clip})
    chat = llavakit.load(classic)
    assert chat.request(messages).visual_sizes.tolist() == [[32, 32, 48]]  # short clips repeat frames, as published
    assert isinstance(chat.chat(messages, max_new_tokens=3), str)
    chat.processor.sampling = {"type": "step", "fps": 2, "max_frames": 32}
    sample = chat.processor.encode(messages)
    assert sample["visual_sizes"] == [MediaSize(6, 32, 48)]
    assert sample["input_ids"].count(chat.config.image_token_id) == 6 * 4 + 1
    chat.processor.configure({"sampling.type": "rate", "sampling.fps": 1, "reading.video.partial": True})
    assert chat.processor.sampling == {"type": "rate", "fps": 1}
    assert chat.processor.encode(messages)["visual_sizes"] == [MediaSize(3, 32, 48)]
    for name, message in (
        ("sampling", "write template, sampling.OPTION"),
        ("reading.film.rate", "unknown modality"),
        ("reading.video.partly", "did you mean 'partial'"),
    ):
        with pytest.raises(UserError, match=message):
            chat.processor.configure({name: 1})
    reloaded = LlavakitProcessor.from_config(chat.config, chat.processor.tokenizer, sampling={"type": "nonsense"})
    with pytest.raises(UserError, match="unknown rule 'nonsense'"):
        reloaded.encode(messages)


@pytest.mark.parametrize(("newline", "per_frame"), [("grid", 4 + 2), ("frame", 4 + 1), ("no_token", 4)])
def test_newline_positions_of_videos(tmp_path, newline, per_frame):
    chat = llavakit.load(write_classic(tmp_path / "classic", mm_newline_position=newline))
    sample = chat.processor.encode(VIDEO)
    assert sample["input_ids"].count(chat.config.image_token_id) == 32 * per_frame
    assert torch.isfinite(forward(chat.model, sample)).all()
    with pytest.raises(UserError, match="cannot be written as 'hf'"):
        convert(tmp_path / "classic", tmp_path / "hf", to="hf")


def test_time_instruction_stands_between_video_and_question():
    text = time_instruction(10.0, [0.0, 1.0])
    assert text.startswith("The video lasts for 10.00 seconds, and 2 frames are uniformly sampled from it. ")
    assert "located at 0.00s,1.00s.Please answer" in text
    (turn,) = with_time_instruction(user(["v.mp4"], "\nWhy?"), 10.0, [0.0, 1.0])
    assert [part["type"] for part in turn["content"]] == ["video", "text"]
    assert turn["content"][1]["text"] == f"\n{text}\n\nWhy?"


@pytest.mark.parametrize(
    ("timing", "times"), [(None, None), ("timestamps", "0.00s,2.00s,4.00s"), ("counted", "0.00s,1.00s,2.00s")]
)
def test_a_processor_writes_the_times_of_the_frames_that_it_reads(classic, tmp_path, timing, times):
    processor = llavakit.load(classic).processor
    processor.configure({"sampling.type": "step", "sampling.fps": 0.5, "reading.video.rate": 2.0})
    processor.configure({"time_instruction": timing})
    video = [picture(19, 13, seed) for seed in range(10)]
    processor.save_pretrained(tmp_path)
    for own in (processor, LlavakitProcessor.from_pretrained(tmp_path)):
        sample = own.encode(user(video, "\nWhat happens?"), add_generation_prompt=True)
        text = own.tokenizer.decode(sample["input_ids"])
        expected = (
            f"lasts for 5.00 seconds, and 3 frames are uniformly sampled from it. These frames are located at {times}"
        )
        assert (expected in text) is (timing is not None)
        assert len(sample["pixel_values"]) == 3
    assert processor.encode(user("Hi"), add_generation_prompt=True)["input_ids"]
    if timing:
        with pytest.raises(UserError, match="takes one video, this conversation has 2 media items"):
            processor.encode(user(video, picture(9, 9), "?"), add_generation_prompt=True)
    with pytest.raises(UserError, match="time_instruction: must be timestamps or counted"):
        processor.configure({"time_instruction": "seconds"})


# Training


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_trains_what_it_should(chat, lora, packing):
    from llavakit.training.lora import prepare
    from llavakit.training.parameter_groups import Rates, optimizer_groups
    from llavakit.training.recipe import parse_recipe

    train = {"multi_modal_projector": True, "image_newline": True}
    if not lora:
        train |= {"language_model": True, "lm_head": True, "vision_tower": 2e-6}
    stage = {"name": "s", "learning_rate": 1e-2, "train": train, "max_length": 512, "packing": packing}
    stage |= {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0}} if lora else {}
    stage = parse_recipe({"model": "tiny", "stages": [stage]}).stages[0]
    model = prepare(copy.deepcopy(chat.model), stage).train()
    batch = Collator(0, 512, packing=packing)([chat.processor.encode(m) for m in (ONE, SEVERAL, VIDEO, TEXT)])
    optimiser = torch.optim.AdamW(
        [{k: v for k, v in group.items() if k != "names"} for group in optimizer_groups(model, Rates.of(stage))]
    )
    losses = []
    for _ in range(3):
        loss = model(**batch, skip_logits=True).loss
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
        if len(losses) == 1:
            touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    assert any("image_newline" in name for name in touched)
    assert any("multi_modal_projector" in name for name in touched)
    assert any("vision_tower" in name for name in touched) is not lora
    assert any("lora_" in name for name in touched) is lora


# Recipe, cost, claim


def test_the_recipe_trains_each_part_at_its_rate():
    from llavakit.system import get_system
    from llavakit.training.build import build_meta, merged_media
    from llavakit.training.parameter_groups import Rates, freeze_all_but, optimizer_groups, trainable_by_part
    from llavakit.training.recipe import load_recipe

    recipe = load_recipe(get_system("llava-onevision").recipe)
    model = build_meta(recipe)
    found = []
    for stage in recipe.stages:
        freeze_all_but(model, stage.train)
        spec = MediaSpec(merged_media(model.config, stage.media))
        tokens = spec.count("image", MediaSize(1, 2304, 2304))
        rates = {group["lr"] for group in optimizer_groups(model, Rates.of(stage))}
        found.append((sum(trainable_by_part(model).values()), rates, tokens, stage.template))
    everything = 397_747_744 + 16_980_992 + 7_615_616_512 + 3584
    assert found == [
        (16_980_992, {1e-3}, 729, "plain"),
        (everything, {1e-5, 2e-6}, 729 + 54 * 55, None),
        (everything, {1e-5, 2e-6}, 7371, None),
        (everything, {1e-5, 2e-6}, 7371, None),
    ]


def test_cost_counts_what_the_formulas_say():
    from llavakit.systems.llava_onevision import cost

    assert cost.vision_flops(cost.kept_siglip()).total == 641_801_428_992
    for size, tokens, flops in (
        ("0.5B", 729, 567_423_553_536),
        ("7B", 1485, 20_265_301_647_360),
        ("7B", 8765, 145_226_566_410_240),
        ("72B", 7371, 1_177_502_007_951_360),
    ):
        assert cost.body_flops(size, tokens) == flops
    assert cost.views_and_tokens(2304, 2304) == (37, 7371)
    assert cost.views_and_tokens(2304, 2304, ratio="anyres") == (37, 27_135)
    assert (cost.video_tokens(32), cost.video_tokens(32, "grid")) == (6273, 6720)


def test_the_miniature_measures_every_arm():
    from llavakit.systems.llava_onevision import miniature

    verdict = miniature.run((0,), transfer_steps=4, budget_steps=2, tower_steps=2)
    assert [len(c.idea.values) for c in verdict.comparisons] == [1] * 5
    assert verdict.verdict in ("supported", "not supported", "inconclusive")
    assert "points against mixing" in verdict.notes


def test_layouts_of_the_miniature_equal_those_of_single_media():
    from llavakit.systems.llava_onevision import miniature

    tokens, newline = torch.randn(3, miniature.FRAMES, 9, 8), torch.randn(8)
    together = miniature.LAYOUTS[miniature.VIDEO](tokens, newline)
    assert together.shape == (3, miniature.FRAMES * 4 + 1, 8)
    for own, sample in zip(together, tokens, strict=True):
        torch.testing.assert_close(miniature.LAYOUTS[miniature.VIDEO](sample[None], newline)[0], own)
        torch.testing.assert_close(own[-1], newline)


def test_counts_in_videos_are_balanced():
    from llavakit.systems.llava_onevision import miniature

    group = miniature.transfer_samples(miniature.VIDEO, 400, torch.Generator().manual_seed(0))
    first, count = miniature.ANSWERS[miniature.VIDEO]
    shares = torch.bincount(group.answer - first, minlength=count) / 400
    assert ((shares - 1 / count).abs() < 0.08).all()
