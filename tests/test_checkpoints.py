"""Checkpoints: the authors' layout, transformers' layout, LoRA and connector-only files, and what can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    SIDE,
    TEXT,
    classic_config,
    language_tensors,
    projector_tensors,
    vocabulary,
    write_classic,
    write_tokenizer,
)
from tiny_server import small_chat

import llavakit
from llavakit.checkpoints.convert import convert, save
from llavakit.checkpoints.files import atomic_folder, clear_write_errors
from llavakit.checkpoints.inspect import inspect_model
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.errors import CheckpointError, UserError


@pytest.fixture
def classic(tmp_path):
    """A full checkpoint in the authors' layout and the folder of its encoder."""
    return write_classic(tmp_path)


def probe(model):
    """Logits of one prompt with an image."""
    count = (SIDE // 4) ** 2
    token = model.config.image_token_id
    ids = torch.tensor([[1, 7, *[token] * count, 9, 12, 5]])
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits


def test_classic_checkpoint_survives_every_round_trip(classic, tmp_path):
    folder, encoder = classic
    first = build(open_checkpoint(folder, vision_tower=encoder))
    before = probe(first)
    convert(folder, tmp_path / "native", to="llavakit", vision_tower=encoder)
    assert torch.equal(probe(build(open_checkpoint(tmp_path / "native"))), before)
    convert(tmp_path / "native", tmp_path / "again", to="original")
    source = {
        **torch.load(folder / "pytorch_model-00001-of-00002.bin"),
        **torch.load(folder / "pytorch_model-00002-of-00002.bin"),
    }
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.equal(written[name], source[name]) for name in source)
    assert torch.equal(probe(build(open_checkpoint(tmp_path / "again"))), before)  # needs nothing beside it
    raw, own = classic_config(), json.loads((tmp_path / "again" / "config.json").read_text())
    for key in ("mm_projector_type", "mm_vision_select_layer", "image_aspect_ratio", "hidden_size", "vocab_size"):
        assert own[key] == raw[key]


def test_export_gives_transformers_the_same_logits_and_comes_back(classic, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder, encoder = classic
    mine = build(open_checkpoint(folder, vision_tower=encoder))
    convert(folder, tmp_path / "hf", to="hf", vision_tower=encoder)
    names = set(load_file(tmp_path / "hf" / "model.safetensors"))
    assert "language_model.lm_head.weight" in names
    assert any(name.startswith("vision_tower.vision_model.") for name in names)
    assert any(name.startswith("language_model.model.") for name in names)
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["text_config"]["architectures"] == ["LlamaForCausalLM"]
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.text_config.vocab_size == -(-(vocabulary() + 2) // 64) * 64  # <image> and <pad>
    torch.testing.assert_close(probe(theirs)[..., : vocabulary()], probe(mine), atol=1e-5, rtol=0)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_processor.do_pad is True
    back = build(open_checkpoint(tmp_path / "hf"))
    torch.testing.assert_close(probe(back)[..., : vocabulary()], probe(mine), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "saved")
    write_tokenizer(tmp_path / "saved")
    resaved = build(open_checkpoint(tmp_path / "saved"))
    torch.testing.assert_close(probe(resaved), probe(back), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [4, 9]},
    ],
    ids=["plain", "patterns", "whole modules and rows"],
)
def test_lora_folder_is_merged_into_its_base(classic, tmp_path, options):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    _, encoder = classic
    generator = torch.Generator().manual_seed(5)
    base, lora = tmp_path / "base", tmp_path / "lora"
    base.mkdir()
    config = LlamaConfig(**TEXT, vocab_size=vocabulary())
    plain = LlamaForCausalLM(config).eval()
    plain.load_state_dict(language_tensors(generator, vocabulary()))
    plain.save_pretrained(base)
    write_tokenizer(base)
    tuned = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(lora)
    trained = projector_tensors(generator)
    torch.save({f"base_model.model.{n}": t for n, t in trained.items()}, lora / "non_lora_trainables.bin")
    (lora / "config.json").write_text(json.dumps(classic_config()))
    merged = build(open_checkpoint(lora, base=base, vision_tower=encoder))
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        wanted, got = tuned(ids).logits, merged(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert torch.equal(merged.model.multi_modal_projector.linear_2.weight, trained["model.mm_projector.2.weight"])
    with pytest.raises(CheckpointError, match="--base"):
        open_checkpoint(lora, vision_tower=encoder)


def test_connector_only_file_joins_its_language_model(classic, tmp_path):
    folder, encoder = classic
    generator = torch.Generator().manual_seed(6)
    only = tmp_path / "only"
    only.mkdir()
    trained = projector_tensors(generator)
    torch.save(trained, only / "mm_projector.bin")
    (only / "config.json").write_text(json.dumps(classic_config()))
    model = build(open_checkpoint(only, base=folder, vision_tower=encoder))
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, trained["model.mm_projector.0.weight"])


def broken(folder: Path, change) -> None:
    file = folder / "pytorch_model-00002-of-00002.bin"
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    kept = {n: f for n, f in index["weight_map"].items() if f != file.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, file.name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.mm_projector.2.bias"), r"linear_2\.bias' is missing"),
        (lambda t: t.update({"model.mm_projector.9.bias": torch.zeros(2)}), r"is unknown to the configuration"),
        (lambda t: t.update({"model.mm_projector.0.bias": torch.zeros(3)}), r"has shape \[3\], .* calls for \[32\]"),
    ],
)
def test_missing_extra_and_misshaped_tensors_are_one_clear_line(classic, change, message):
    folder, encoder = classic
    broken(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        build(open_checkpoint(folder, vision_tower=encoder))
    assert "\n" not in str(caught.value)


def test_folders_that_are_not_models(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert' is not a layout"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(tmp_path)


def test_pickles_that_hold_code_are_refused(classic):
    folder, encoder = classic

    class Trap:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match="not a readable state dict"):
        build(open_checkpoint(folder, vision_tower=encoder))


def test_a_failed_write_leaves_the_previous_checkpoint_whole(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("kept")

    def fill_the_disk() -> None:
        with atomic_folder(target) as scratch:
            (scratch / "new").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="nothing was changed"):
        fill_the_disk()
    assert (target / "old").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_convert_refuses_a_folder_that_is_not_empty(classic, tmp_path):
    folder, encoder = classic
    with pytest.raises(UserError, match="is not empty"):
        convert(folder, folder, to="hf", vision_tower=encoder)


def test_inspect_counts_parameters_by_part(classic):
    folder, encoder = classic
    facts = inspect_model(folder, vision_tower=encoder)
    parts = {part["name"]: part["parameters"] for part in facts["parts"]}
    assert parts["multi_modal_projector"] == 16 * 32 + 32 + 32 * 32 + 32
    assert facts["tokens"][0] == {
        "modality": "image",
        "size": [1, 336, 336],
        "planner": "Pad",
        "views": 1,
        "tokens": 16,
    }


def test_load_answers_about_an_image(classic):
    from PIL import Image

    folder, encoder = classic
    model = llavakit.load(folder, vision_tower=encoder)
    part = {"type": "image", "image": Image.new("RGB", (40, 20), "red")}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
    answer = model.chat(messages, max_new_tokens=6)
    assert isinstance(answer, str)
    assert "".join(model.stream(messages, max_new_tokens=6)).strip() == answer
    assert model.generate(messages, max_new_tokens=6, do_sample=False) == answer


def test_published_shapes_of_seven_billion_parameters():
    from llavakit.systems.llava_1_5.checkpoint import LlavaLayout

    raw = classic_config(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        mm_hidden_size=1024,
        mm_vision_tower="openai/clip-vit-large-patch14-336",
    )
    config = LlavaLayout().read_config(raw, {})
    with torch.device("meta"):
        net = tiny.LlavakitForConditionalGeneration(config)
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    assert count(net.model.vision_tower) == 303_507_456
    assert count(net.model.multi_modal_projector) == 20_979_712
    assert count(net.model.language_model) + count(net.lm_head) == 6_738_415_616
    names = dict(LlavaLayout().write_state(config, net.state_dict()))
    assert tuple(names["model.mm_projector.0.weight"].shape) == (4096, 1024)
    assert tuple(names["model.layers.31.mlp.down_proj.weight"].shape) == (4096, 11008)
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.23.mlp.fc2.bias" in names


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            SafetensorError("Error while serializing: No space left on device (os error 28)"),
            "No space left on",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), "file system refused"),
        (Exception("File too large (os error 27)"), "File too large"),
    ],
)
def test_every_library_s_way_of_saying_that_the_disk_is_full_is_one_line(tmp_path, error, reason):
    def fill_the_disk() -> None:
        with clear_write_errors(tmp_path / "outer", "the last one is whole"), atomic_folder(tmp_path / "inner"):
            raise error

    with pytest.raises(CheckpointError, match=rf"outer: could not be written \(.*{reason}.*\); the last one is whole"):
        fill_the_disk()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), clear_write_errors(tmp_path):
        raise ZeroDivisionError


def test_a_recipe_takes_single_parts_out_of_the_authors_folders(classic, tmp_path):
    from llavakit.training.build import build_model
    from llavakit.training.recipe import load_recipe

    folder, encoder = classic
    connector = tmp_path / "stage1"  # what the authors publish after stage 1: the connector alone
    connector.mkdir()
    stem = projector_tensors(torch.Generator().manual_seed(9))
    torch.save(stem, connector / "mm_projector.bin")
    shutil.copy(folder / "config.json", connector)
    recipe = {
        "system": "llava-1.5",
        "parts": {
            "media": {"image": {"views": {"type": "pad", "size": SIDE}}},
            "init": {
                "language_model": str(folder),
                "vision_tower": str(encoder),
                "multi_modal_projector": str(connector),
            },
        },
        "data": [{"name": "x", "path": "x.json"}],
        "stages": [{"name": "tune", "train": ["multi_modal_projector"], "learning_rate": 1e-3}],
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model, processor = build_model(load_recipe(tmp_path / "recipe.yaml", []))
    source = load_file(encoder / "model.safetensors") | torch.load(folder / "pytorch_model-00001-of-00002.bin") | stem
    own = model.state_dict()
    assert torch.equal(own["lm_head.weight"], source["lm_head.weight"])
    for name in ("embed_tokens.weight", "layers.1.mlp.down_proj.weight", "norm.weight"):
        assert torch.equal(own[f"model.language_model.{name}"], source[f"model.{name}"])
    assert torch.equal(own["model.multi_modal_projector.linear_2.weight"], source["model.mm_projector.2.weight"])
    assert len(processor.tokenizer) == vocabulary() + 1

    recipe["parts"]["init"] |= {"language_model": str(connector), "multi_modal_projector": str(folder)}
    recipe["parts"]["tokenizer"] = str(folder)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(CheckpointError, match=r"parts.init.language_model: tensor .* is missing"):
        build_model(load_recipe(tmp_path / "recipe.yaml", []))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_feature_layer": "x"}, "vision_feature_layer: is 'x', it should be the number of a layer"),
        ({"vision_feature_layer": -9}, "vision_feature_layer: is -9, the encoder has 3 layers"),
        ({"connector": {"type": "nothing"}}, "unknown connector 'nothing'"),
        ({"connector": 3}, "connector: is 3, it should be of type dict"),
        ({"text_config": {"model_type": "llamma"}}, "model_type 'llamma'"),
        ({"media": {"image": {"views": {"type": "pad", "sze": 3}}}}, "view planner 'pad': has no option 'sze'"),
        ({"media": {"image": {}}}, "views"),
        ({"vision_feature_select_strategy": "all"}, "should be 'default' or 'full'"),
    ],
)
def test_a_wrong_value_in_config_json_is_one_line_with_the_file(classic, tmp_path, change, said):
    folder, encoder = classic
    convert(folder, tmp_path / "own", to="llavakit", vision_tower=encoder)
    path = tmp_path / "own" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        llavakit.load(tmp_path / "own")
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_files_of_the_processor_and_devices_that_are_not_there_are_one_line(classic, tmp_path):
    folder, encoder = classic
    convert(folder, tmp_path / "own", to="llavakit", vision_tower=encoder)
    with pytest.raises(UserError, match="device 'cudaa' cannot be used here"):
        llavakit.load(tmp_path / "own", device="cudaa")
    (tmp_path / "own" / "processor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"processor_config\.json"):
        llavakit.load(tmp_path / "own")
    (tmp_path / "own" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        llavakit.load(tmp_path / "own")
    (tmp_path / "own" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        llavakit.load(tmp_path / "own")


def test_a_misshaped_tensor_is_not_converted(classic, tmp_path):
    folder, encoder = classic
    convert(folder, tmp_path / "own", to="llavakit", vision_tower=encoder)
    file = tmp_path / "own" / "model.safetensors"
    save_file(load_file(file) | {"model.language_model.norm.weight": torch.zeros(3)}, file)
    for form in ("hf", "original", "llavakit"):
        with pytest.raises(CheckpointError, match=r"norm.weight' has shape \[3\], the configuration calls for \[32\]"):
            convert(tmp_path / "own", tmp_path / form, to=form)
        assert not (tmp_path / form).exists()


def test_a_checkpoint_says_where_its_template_ends_replies(tmp_path):
    chat = small_chat()
    tokenizer = chat.processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]}, replace_extra_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat.processor.template = "chatml_direct"
    save(chat.model.state_dict(), chat.config, chat.processor, tmp_path / "own", {"eos_token_id": 9, "top_k": 3})
    written = json.loads((tmp_path / "own" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [9, end], "top_k": 3}
    save(chat.model.state_dict(), chat.config, chat.processor, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text()) == {"eos_token_id": [2, end]}
    chat.processor.template = "v1"  # which ends at the tokenizer's own token
    save(chat.model.state_dict(), chat.config, chat.processor, tmp_path / "plain")
    assert not (tmp_path / "plain" / "generation_config.json").exists()
