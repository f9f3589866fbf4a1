"""transformers' folders of type `llava`: pixels, ids, logits and replies are those of AutoProcessor and its class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.errors import CheckpointError, UserError
from llavakit.model.routes import MediaSpec
from llavakit.views.plan import MediaSize

GOLDEN = Path(__file__).parent / "golden" / "llava-1.5"
SIDE = tiny.SIZE

# Published chat templates of this kind: LLaVA-1.5's without a system text, and ChatML with a begin token in between.
PLAIN = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)

HALF, IMAGENET = [0.5] * 3, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CROP = {"height": SIDE, "width": SIDE}
PROCESSORS = {
    "clip": lambda: CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=CROP),
    "siglip": lambda: SiglipImageProcessor(size=CROP, image_mean=HALF, image_std=HALF, resample=2),
    "dinov2": lambda: BitImageProcessor(
        size={"shortest_edge": SIDE + 6}, crop_size=CROP, image_mean=IMAGENET[0], image_std=IMAGENET[1]
    ),
}
TEMPLATES = {"llama": PLAIN, "qwen2": CHATML, "mistral": INST}


def tokenizer_of(decoder: str) -> PreTrainedTokenizerFast:
    if decoder == "qwen2":
        file, specials = GOLDEN / "tokenizer-bpe" / "tokenizer_bpe.json", {"eos_token": "<|endoftext|>"}
    else:
        name = "nonlegacy" if decoder == "llama" else "legacy"
        file = GOLDEN / "tokenizer-sp" / f"tokenizer_{name}.json"
        specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), padding_side="left", **specials)


def write_folder(folder: Path, encoder: str, decoder: str, processor=None, **config) -> Path:
    """A folder as transformers writes it, with random weights."""
    tokenizer = tokenizer_of(decoder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    prefix = 0 if encoder == "siglip" else 1
    options = {
        "vision_config": dict(tiny.ENCODERS[encoder]),
        "text_config": dict(tiny.DECODERS[decoder]) | {"vocab_size": len(tokenizer) + 5},
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": "default" if prefix else "full",
        "vision_feature_layer": -2,
        **config,
    }
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, 40], pad_token_id=0)
    model.save_pretrained(folder)
    LlavaProcessor(
        processor or PROCESSORS[encoder](),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=options["vision_feature_select_strategy"],
        num_additional_image_tokens=prefix,
        chat_template=TEMPLATES[decoder],
    ).save_pretrained(folder)
    return folder


def picture(width: int = 97, height: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def image(*size: int) -> dict:
    return {"type": "image", "image": picture(*size)}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [words(text)]}


CONVERSATIONS = [
    [user(image(), words("What is this?"))],
    [user(image(41, 83), words(" Which of "), image(64, 64), words("these?")), assistant("Both."), user(words("Why?"))],
    [user(words("No picture")), assistant("Indeed"), user(image(), words("now"))],
    [user(words("Text alone, twice:  blanks"))],
]


def theirs(processor, messages):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("encoder", ["clip", "siglip", "dinov2"])
def test_pixels_ids_logits_and_replies_equal_transformers(tmp_path, encoder, decoder):
    folder = write_folder(tmp_path / "hf", encoder, decoder)
    chat = llavakit.load(folder)
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    assert chat.processor.template == "tokenizer"
    for messages in CONVERSATIONS:
        wanted = theirs(processor, messages)
        request = chat.request(messages, max_new_tokens=6)
        assert request.input_ids.tolist() == wanted["input_ids"][0].tolist()
        if "pixel_values" in wanted:
            torch.testing.assert_close(torch.stack(request.pixel_values), wanted["pixel_values"], atol=1e-6, rtol=0)
        with torch.no_grad():
            logits = model(**wanted).logits
        ids = wanted["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if request.pixel_values:
            inputs |= {"pixel_values": torch.stack(request.pixel_values), "visual_sizes": request.visual_sizes}
        with torch.no_grad():
            torch.testing.assert_close(chat.model(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
        options = {"do_sample": False, "suppress_tokens": [chat.config.image_token_id]}  # it would ask for an image
        reply = model.generate(**wanted, max_new_tokens=6, **options)[0, ids.shape[1] :].tolist()
        ours = list(chat.engine.submit(request).result().token_ids)
        ends = [token for token in reply if token in (40, chat.processor.tokenizer.eos_token_id)]
        kept = reply[: reply.index(ends[0])] if ends else reply
        assert ours[: len(kept)] == kept
    assert 40 in chat.eos_token_ids


STRANGE = {
    "padded": LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": SIDE}, crop_size=CROP, image_mean=HALF, image_std=[0.2, 0.3, 0.4]
    ),
    "cropped": CLIPImageProcessor(size={"shortest_edge": SIDE + 9}, crop_size=CROP, resample=1),
    "squashed, then cropped": SiglipImageProcessor(
        size={"height": 45, "width": 45}, do_center_crop=True, crop_size=CROP, resample=0
    ),
    "not rescaled": CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=CROP, do_rescale=False),
    "rescaled to two": CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=CROP, rescale_factor=1 / 127.5),
    "not normalised": CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=CROP, do_normalize=False),
}


@pytest.mark.parametrize("name", STRANGE)
def test_every_option_of_a_processor_counts(tmp_path, name):
    folder = write_folder(tmp_path / "hf", "clip", "llama", STRANGE[name])
    processor, ours = AutoProcessor.from_pretrained(folder), llavakit.load(folder).processor
    for size in ((97, 60), (30, 141), (SIDE, SIDE), (11, 10)):
        messages = [user(image(*size), words("?"))]
        sample, wanted = ours.encode(messages, add_generation_prompt=True), theirs(processor, messages)
        torch.testing.assert_close(torch.stack(sample["pixel_values"]), wanted["pixel_values"], atol=1e-5, rtol=0)
    convert(folder, tmp_path / "again", to="hf")
    again = AutoProcessor.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(theirs(again, messages)["pixel_values"], wanted["pixel_values"], atol=1e-5, rtol=0)


def change(folder: Path, file: str, **options) -> Path:
    raw = json.loads((folder / file).read_text())
    for name, value in options.items():
        section, _, key = name.rpartition("__")
        (raw[section] if section else raw)[key] = value
    (folder / file).write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_processor__do_resize": False}, "do_resize is off"),
        ({"image_processor__do_center_crop": False}, "do_center_crop is off with size {'shortest_edge': 32}"),
        ({"image_processor__size": {"height": 32, "width": 48}}, "size is {'height': 32, 'width': 48}"),
        ({"image_processor__size": {"shortest_edge": 32, "longest_edge": 90}}, "'longest_edge': 90"),
        ({"image_processor__size": "large"}, "processor_config.json: "),
        ({"image_processor__image_mean": [0.5, 0.5]}, "processor_config.json: "),
        ({"image_processor__image_mean": "bright"}, "processor_config.json: "),
        ({"image_processor__resample": 77}, "processor_config.json: "),
        ({"image_processor__resample": [3]}, "processor_config.json: "),
        ({"image_processor__crop_size": {"height": 32, "width": 16}}, "crop_size is {'height': 32, 'width': 16}"),
        ({"image_processor__sharpen": 2}, "'sharpen': 2 is not understood"),
        ({"image_processor__image_processor_type": "VivitImageProcessor"}, "processor_config.json: "),
        ({"image_processor": [1]}, "image_processor is [1], it should be an object"),
        ({"patch_size": 14}, "patch_size is 14; llavakit reads None, 8"),
        ({"patch_size": "8"}, "patch_size is '8'"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"num_additional_image_tokens": 4}, "num_additional_image_tokens is 4, the encoder has 1"),
        ({"image_token": "<img>"}, "image_token is '<img>'"),
        ({"chat_template": 3}, "chat_template is 3, it should be a Jinja text"),
        ({"tile_size": 3}, "'tile_size': 3 is not understood"),
    ],
)
def test_what_cannot_be_expressed_is_refused_in_one_line(tmp_path, options, said):
    folder = write_folder(tmp_path / "hf", "clip", "llama")
    if "chat_template" in options:
        (folder / "chat_template.jinja").unlink()
    change(folder, "processor_config.json", **options)
    with pytest.raises(CheckpointError) as caught:
        llavakit.load(folder)
    assert said in str(caught.value)
    assert "processor_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_token_index": 3}, "<image> has id 3 in config.json and 763 in the tokenizer's files"),
        ({"vision_feature_select_strategy": "cls"}, "config.json: "),
        ({"projector_hidden_act": 7}, "config.json: "),
        ({"vision_feature_layer": -9}, "vision_feature_layer: is -9"),
        ({"multimodal_projector_bias": False}, "is unknown to the configuration"),
        ({"mystery": 1}, "'mystery': 1 is not understood"),
        ({"text_config__mystery": 1}, "text_config: 'mystery': 1 is not understood"),
        ({"vision_config__mystery": 1}, "vision_config: 'mystery': 1 is not understood"),
    ],
)
def test_configs_that_disagree_are_refused_in_one_line(tmp_path, options, said):
    folder = change(write_folder(tmp_path / "hf", "clip", "llama"), "config.json", **options)
    with pytest.raises(CheckpointError) as caught:
        llavakit.load(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_default_of_an_encoder_without_class_token_drops_one_patch(tmp_path):
    """transformers drops the first of SigLIP's patches, which is then missing from the prompt too."""
    folder = write_folder(tmp_path / "hf", "siglip", "llama", vision_feature_select_strategy="default")
    chat, processor = llavakit.load(folder), AutoProcessor.from_pretrained(folder)
    assert chat.config.vision_feature_select_strategy == "drop_first"
    assert MediaSpec(chat.config).count("image", MediaSize(1, 50, 50)) == 15
    wanted = theirs(processor, CONVERSATIONS[0])
    request = chat.request(CONVERSATIONS[0])
    assert request.input_ids.tolist() == wanted["input_ids"][0].tolist()
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = chat.model(input_ids=wanted["input_ids"], pixel_values=wanted["pixel_values"]).logits
        torch.testing.assert_close(logits, model(**wanted).logits, atol=1e-5, rtol=1e-5)
    convert(folder, tmp_path / "again", to="hf")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["vision_feature_select_strategy"] == "default"


def test_registers_of_dinov2_stay_where_transformers_keeps_them(tmp_path):
    encoder = tiny.ENCODERS["dinov2"] | {"model_type": "dinov2_with_registers", "num_register_tokens": 3}
    folder = write_folder(tmp_path / "hf", "dinov2", "llama", vision_config=encoder)
    raw = json.loads((folder / "processor_config.json").read_text())
    assert raw["num_additional_image_tokens"] == 1
    with pytest.raises(CheckpointError, match="num_additional_image_tokens is 1, the encoder has 4"):
        llavakit.load(folder)  # transformers refuses this pair too
    change(folder, "processor_config.json", num_additional_image_tokens=4)
    chat = llavakit.load(folder)
    wanted = theirs(AutoProcessor.from_pretrained(folder), CONVERSATIONS[0])
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = chat.model(input_ids=wanted["input_ids"], pixel_values=wanted["pixel_values"]).logits
        torch.testing.assert_close(logits, model(**wanted).logits, atol=1e-5, rtol=1e-5)


# Templates


def test_another_template_can_be_asked_for(tmp_path):
    folder = write_folder(tmp_path / "hf", "clip", "llama")
    chat = llavakit.load(folder, template="v1")
    text = chat.processor.tokenizer.decode(chat.request([user(words("Hello"))]).input_ids)
    assert text.startswith("<s> A chat between")
    assert "</s>" in chat.processor.tokenizer.decode(list(chat.eos_token_ids))
    chat.processor.configure({"template": "tokenizer"})
    assert "USER: Hello" in chat.processor.tokenizer.decode(chat.request([user(words("Hello"))]).input_ids)
    with pytest.raises(UserError, match="unknown chat template 'v11'"):
        llavakit.load(folder, template="v11")
    convert(folder, tmp_path / "own", to="llavakit", template="v1")
    assert llavakit.load(tmp_path / "own").processor.template == "v1"
    assert llavakit.load(tmp_path / "own", template="llava_v1").processor.template == "llava_v1"


def test_a_folder_without_a_template_has_the_published_one_or_none(tmp_path):
    folder = write_folder(tmp_path / "llama", "clip", "llama")
    (folder / "chat_template.jinja").unlink()
    assert llavakit.load(folder).processor.template == "v1"
    folder = write_folder(tmp_path / "qwen", "clip", "qwen2")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="--template"):
        llavakit.load(folder)
    assert llavakit.load(folder, template="qwen_1_5").processor.template == "qwen_1_5"


def test_a_template_of_strings_gets_placeholders_in_its_text(tmp_path):
    folder = write_folder(tmp_path / "hf", "clip", "qwen2")
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    chat = llavakit.load(folder)
    processor = AutoProcessor.from_pretrained(folder)
    wanted = processor(
        text="<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n", images=picture()
    )
    assert chat.request(CONVERSATIONS[0]).input_ids.tolist() == list(wanted["input_ids"][0])
