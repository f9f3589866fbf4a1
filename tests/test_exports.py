"""`--to hf`: what transformers loads answers like the source, or the export is refused and names the option."""

from __future__ import annotations

import json
from pathlib import Path

import export_cases
import pytest
import tiny
from export_cases import HALF, conversations, picture, worst, write
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llavakit
from llavakit.checkpoints import layouts
from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import open_checkpoint
from llavakit.errors import CheckpointError, UserError
from llavakit.systems.llava_1_5.checkpoint import LlavaTransformersLayout

FAST = {("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "mistral"), ("clip", "phi"), ("siglip", "gpt2")}
CELLS = [
    pytest.param(encoder, decoder, marks=() if (encoder, decoder) in FAST else pytest.mark.slow)
    for encoder in export_cases.ENCODERS
    for decoder in export_cases.DECODERS
]
REASONS = {"phi": "the head of 'phi' has a bias", "gpt2": "transformers' class does not run with"}


@pytest.mark.parametrize(("encoder", "decoder"), CELLS)
def test_an_export_answers_like_its_source_or_is_refused(tmp_path, encoder, decoder):
    write(tmp_path / "own", encoder, decoder)
    if decoder in REASONS:
        with pytest.raises(UserError, match=REASONS[decoder]) as caught:
            convert(tmp_path / "own", tmp_path / "hf", to="hf")
        assert "text_config.model_type" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["own"]
        return
    convert(tmp_path / "own", tmp_path / "hf", to="hf")
    assert worst(tmp_path / "own", tmp_path / "hf") < 1e-5
    back = open_checkpoint(tmp_path / "hf")
    assert back.config.media["image"]["views"]["type"] == export_cases.VIEWS[encoder]["type"]


VIDEO = {"views": {"type": "frames", "frame": {"type": "squash", "size": 32}}}
OPTIONS = {
    "crop": {"views": {"type": "square", "size": tiny.SIZE + 16, "crop": tiny.SIZE}},
    "filter": {"views": {"type": "pad", "size": tiny.SIZE, "resample": "lanczos", **HALF}},
    "rescaled": {"views": {"type": "squash", "size": tiny.SIZE, "rescale_factor": 1 / 127.5, **HALF}},
    "two layers": {"vision_feature_layer": [-2, 1]},
    "class token": {"vision_feature_select_strategy": "full"},
    "one dropped": {"vision_feature_select_strategy": "drop_first"},
    "no bias": {"connector": {"type": "mlp", "act": "relu", "bias": False}},
    "tied": {"tie_word_embeddings": True},
    "spare rows": {"spare": 70},
    "another template": {"template": "llava_llama_2"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_transformers(tmp_path, name):
    write(tmp_path / "own", "clip", "llama", **OPTIONS[name])
    convert(tmp_path / "own", tmp_path / "hf", to="hf")
    assert worst(tmp_path / "own", tmp_path / "hf") < 1e-5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"connector": {"type": "mlp", "depth": 1}}, "connector.depth: is 1"),
        ({"connector": {"type": "resampler", "queries": 4, "heads": 2}}, "connector.type: is 'resampler'"),
        ({"views": {"type": "pad", "size": 32, "background": [0, 0, 0]}}, "media.image.views.background"),
        ({"views": {"type": "anyres", "size": 32, "pinpoints": [[32, 64]]}}, "media.image.views.type"),
        (
            {"media": {"image": {"views": {"type": "pad", "size": 32}}, "video": VIDEO}},
            "media.video",
        ),
        (
            {
                "media": {
                    "image": {"views": {"type": "pad", "size": 32}},
                    "multi_image": {"views": {"type": "square", "size": 32}},
                }
            },
            "media.multi_image",
        ),
        (
            {
                "vision_config": tiny.ENCODERS["dinov2"]
                | {"model_type": "dinov2_with_registers", "num_register_tokens": 2},
            },
            "vision_feature_select_strategy: transformers drops one token",
        ),
        ({"vision_config": tiny.ENCODERS["convnext"], "vision_feature_layer": -1}, "vision_config.patch_size"),
    ],
)
def test_what_transformers_lacks_is_named(tmp_path, fields, said):
    write(tmp_path / "own", "clip", "llama", **fields)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "own", tmp_path / "hf", to="hf")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_registers_that_are_kept_are_exported(tmp_path):
    encoder = tiny.ENCODERS["dinov2"] | {"model_type": "dinov2_with_registers", "num_register_tokens": 2}
    write(tmp_path / "own", "dinov2", "llama", vision_config=encoder, vision_feature_select_strategy="full")
    convert(tmp_path / "own", tmp_path / "hf", to="hf")
    assert worst(tmp_path / "own", tmp_path / "hf") < 1e-5


def test_a_batch_generates_like_its_rows(tmp_path):
    write(tmp_path / "own", "clip", "llama")
    convert(tmp_path / "own", tmp_path / "hf", to="hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    assert processor.tokenizer.padding_side == "left"
    texts = ["USER: <image>\nWhat is this? ASSISTANT:", "USER: <image>\nHm? ASSISTANT:", "USER: Hello ASSISTANT:"]
    images = [picture(50, 20), picture(20, 70, 1)]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for number, text in enumerate(texts):
        own = processor(text=text, images=images[number : number + 1] or None, return_tensors="pt")
        alone = model.generate(**own, **options)[0, own["input_ids"].shape[1] :]
        assert together[number, : len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("layout", ["own", "hf"])
def test_rendering_first_and_tokenising_then_gives_one_begin_token(tmp_path, layout, decoder):
    written = write(tmp_path / "own", "clip", decoder)
    if layout == "hf":
        convert(tmp_path / "own", tmp_path / "hf", to="hf")
    processor = AutoProcessor.from_pretrained(tmp_path / layout)
    for messages in conversations():
        wanted = written.encode(messages, add_generation_prompt=True)["input_ids"]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [part["image"] for turn in messages for part in turn["content"] if "image" in part]
        assert list(processor(text=text, images=images or None)["input_ids"][0]) == wanted
        once = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert list(once["input_ids"][0]) == wanted


def test_our_own_processor_cuts_several_images_as_such(tmp_path):
    several = {
        "image": {"views": {"type": "anyres", "size": tiny.SIZE, "pinpoints": [[64, 64]]}},
        "multi_image": {"views": {"type": "pad", "size": tiny.SIZE}},
    }
    written = write(tmp_path / "own", "clip", "llama", media=several)
    processor = AutoProcessor.from_pretrained(tmp_path / "own")
    one, two = conversations()[:2]
    for messages, views in ((one, 5), (two, 2)):
        sample = written.encode(messages, add_generation_prompt=True)
        given = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert given["input_ids"][0].tolist() == sample["input_ids"]
        assert len(given["pixel_values"]) == len(sample["pixel_values"]) == views
        assert given["visual_modalities"].tolist() == sample["visual_modalities"]
    texts = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages in (one, two)]
    images = [part["image"] for turn in (*one, *two) for part in turn["content"] if "image" in part]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert batch["visual_modalities"].tolist() == [0, 3, 3]


# What is written is read back


class Swapped(LlavaTransformersLayout):
    """A layout that writes wrong tensors of the right shapes."""

    def write_state(self, config, state):
        names = {"model.language_model.layers.0.self_attn.q_proj.weight", "lm_head.weight"}
        for name, tensor in super().write_state(config, state):
            wrong = any(name.endswith(part.removeprefix("model.language_model.")) for part in names)
            yield name, tensor.flip(-1) if wrong else tensor


class Lost(LlavaTransformersLayout):
    """A layout that forgets a tensor."""

    def write_state(self, config, state):
        yield from (pair for pair in super().write_state(config, state) if "layers.1.mlp.up_proj" not in pair[0])


class Other(LlavaTransformersLayout):
    """A layout that writes another configuration."""

    def write_config(self, config):
        return super().write_config(config) | {"vision_feature_layer": -1}


@pytest.mark.parametrize(
    ("cls", "said"),
    [(Swapped, "gives logits that differ"), (Lost, "missing_keys"), (Other, "gives logits that differ")],
)
def test_a_layout_that_errs_is_found_out_before_anything_is_published(tmp_path, monkeypatch, cls, said):
    write(tmp_path / "own", "clip", "llama")
    monkeypatch.setattr(layouts, "layout_for", lambda config, form: cls())
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "own", tmp_path / "hf", to="hf")
    monkeypatch.setattr("llavakit.checkpoints.convert.rehearse", lambda *args: None)
    with pytest.raises(CheckpointError, match=r"read back|vision_feature_layer|is missing"):
        convert(tmp_path / "own", tmp_path / "hf", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"views": {"type": "pad", "size": 32, "resample": "bilinear"}}, "media.image.views.resample"),
        ({"views": {"type": "pad", "size": 32, "background": [1, 2, 3]}}, "media.image.views.background"),
        ({"views": {"type": "square", "size": 40, "crop": 32}}, "media.image.views.size"),
        ({"views": {"type": "square", "size": 32, **HALF}}, "media.image.views.image_mean"),
        ({"connector": {"type": "mlp", "act": "relu"}}, "media.image.connector.act"),
    ],
)
def test_the_authors_layout_names_what_it_has_no_place_for(tmp_path, fields, said):
    write(tmp_path / "own", "clip", "llama", **fields)
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "own", tmp_path / "original", to="original")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_template_that_files_do_not_hold_is_a_note(tmp_path):
    write(tmp_path / "own", "clip", "llama", template="llava_v1")
    notes = convert(tmp_path / "own", tmp_path / "original", to="original")["notes"]
    assert notes == ["the files do not hold the template 'llava_v1'; give it with --template"]
    assert llavakit.load(tmp_path / "original", template="llava_v1").processor.template == "llava_v1"


def test_our_own_files_are_read_back_too(tmp_path, monkeypatch):
    from llavakit.checkpoints import convert as module

    real = module.write_state

    def damaged(folder, state, *options):
        real(folder, ((name, tensor + 1 if name == "lm_head.weight" else tensor) for name, tensor in state), *options)

    monkeypatch.setattr(module, "write_state", damaged)
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight' differs when what was written is read back"):
        write(tmp_path / "own", "clip", "llama")
    assert not list(tmp_path.iterdir())


def test_names_of_dinov2_on_disk_are_the_published_ones(tmp_path):
    write(tmp_path / "own", "dinov2", "llama")
    names = set(load_file(tmp_path / "own" / "model.safetensors"))
    assert "model.vision_tower.encoder.layer.0.attention.attention.query.weight" in names
    convert(tmp_path / "own", tmp_path / "hf", to="hf")
    exported = set(load_file(tmp_path / "hf" / "model.safetensors"))
    assert "vision_tower.encoder.layer.0.attention.attention.query.weight" in exported


def test_a_large_model_is_rehearsed_with_its_first_layers(tmp_path, monkeypatch):
    from llavakit.checkpoints import export

    seen = []
    real = export._their_logits

    def note(layout, folder, inputs):
        seen.append(json.loads((Path(folder) / "config.json").read_text())["text_config"]["num_hidden_layers"])
        return real(layout, folder, inputs)

    monkeypatch.setattr(export, "_their_logits", note)
    monkeypatch.setattr(export, "WHOLE", 1000)
    text = tiny.DECODERS["mistral"] | {"num_hidden_layers": 5, "vocab_size": 763}
    write(tmp_path / "own", "clip", "mistral", text_config=text)
    convert(tmp_path / "own", tmp_path / "hf", to="hf")
    assert seen == [2]
    assert worst(tmp_path / "own", tmp_path / "hf") < 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(template=3), "template is 3, it should be a string"),
        (lambda raw: raw.update(sampling="fast"), "sampling is 'fast', it should be an object"),
        (lambda raw: raw.update(reading=[1]), "reading is [1], it should be an object"),
        (lambda raw: raw.update(image_processor=[]), "image_processor is [], it should be an object"),
        (lambda raw: raw.update(mood="good"), "'mood': 'good' is not understood"),
        (lambda raw: raw.update(template="v11"), "unknown chat template 'v11'"),
        (lambda raw: raw["image_processor"].update(architecture=3), "architecture is 3"),
        (
            lambda raw: raw["image_processor"]["architecture"]["media"]["image"]["views"].update(size=16),
            "config.json: media.image.views.size is 32, and 16 in processor_config.json",
        ),
        (
            lambda raw: raw["image_processor"]["architecture"].update(vision_feature_layer=-1),
            "config.json: vision_feature_layer is -2, and -1 in processor_config.json",
        ),
    ],
)
def test_our_own_processor_files_fit_the_configuration_or_are_one_line(tmp_path, change, said):
    write(tmp_path / "own", "clip", "llama")
    path = tmp_path / "own" / "processor_config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        llavakit.load(tmp_path / "own")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
