"""Files of a checkpoint: every key and every tensor is consumed or refused, and nothing half-written is published."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_classic

from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.fields import INERT, Fields
from llavakit.checkpoints.files import atomic_folder
from llavakit.checkpoints.layouts import Layout
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.errors import CheckpointError
from llavakit.registry import LAYOUTS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_classic(tmp_path_factory.mktemp("source"))


@pytest.fixture
def own(source, tmp_path):
    """The same model in llavakit's layout."""
    folder, encoder = source
    convert(folder, tmp_path / "own", to="llavakit", vision_tower=encoder)
    return tmp_path / "own"


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, **sources) -> str:
    with pytest.raises(CheckpointError) as caught:
        build(open_checkpoint(folder, **sources))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


# Keys


def test_a_layout_that_overlooks_a_key_is_noticed(own, tmp_path):
    """The rule holds for layouts that are written later: reading goes through `Fields`, whatever the layout does."""

    class Careless(Layout):
        system, form = "careless", "original"
        inert = {"colour_of_the_logo": "is painted on the web page"}

        def matches(self, raw, folder):
            return raw.get("model_type") == "careless"

        def read(self, folder, raw, sources):
            assert raw["size"] == 3
            checkpoint = open_checkpoint(own)
            return checkpoint.config, checkpoint.state

    folder = tmp_path / "careless"
    folder.mkdir()
    LAYOUTS.add("careless", Careless)
    try:
        config = {"model_type": "careless", "size": 3, "colour_of_the_logo": "red", "torch_dtype": "float16", "x": None}
        (folder / "config.json").write_text(json.dumps(config))
        assert open_checkpoint(folder).layout == "careless (original)"
        (folder / "config.json").write_text(json.dumps(config | {"depth": [1, 2]}))
        assert f"{folder}/config.json: 'depth': [1, 2] is not understood" in refusal(folder)
    finally:
        LAYOUTS._entries.pop("careless")


def test_every_reason_is_given():
    assert all(len(reason.split()) > 3 for reason in INERT.values())
    for name in LAYOUTS:
        assert all(len(reason.split()) > 3 for reason in LAYOUTS.get(name)().inert.values()), name


def test_fields_note_what_is_read():
    fields = Fields({"a": 1, "b": 2, "c": None, "d": {}})
    assert "a" in fields
    assert list(fields) == ["a", "b", "c", "d"]
    assert fields.unread().keys() == {"a", "b", "c", "d"}
    other = fields.renamed(str.upper)
    assert (fields["a"], other.get("B"), fields.get("e", 5)) == (1, 2, 5)
    assert fields.unread().keys() == {"c", "d"}
    with pytest.raises(CheckpointError, match=r"config\.json: 'd': {} is not understood"):
        fields.finish()
    with pytest.raises(CheckpointError, match=r"a is 1; llavakit reads 2, 3"):
        fields.one_of("a", 2, 3)
    with pytest.raises(CheckpointError, match="'x_a' and 'a' mean the same"):
        Fields({"x_a": 1, "a": 1}).renamed(lambda key: key.removeprefix("x_"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_use_magic": True}, "'mm_use_magic': True is not understood"),
        ({"mm_resampler_type": "perceiver"}, "'mm_resampler_type': 'perceiver' is not understood"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"image_aspect_ratio": "crop_split"}, "image_aspect_ratio is 'crop_split'; known: pad, square, anyres"),
        ({"mm_vision_select_feature": "all"}, "mm_vision_select_feature is 'all'; llavakit reads 'patch', 'cls_patch'"),
        ({"mm_hidden_size": 17}, "mm_hidden_size is 17, the encoder's features have 16"),
        ({"model_type": ["llava"]}, "model_type is ['llava'], not a string"),
        ({"architectures": [3]}, "architectures is [3], not a list of strings"),
        ({"hidden_size": 10**40}, "config.json: "),
        ({"hidden_size": "many"}, "config.json: "),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"mm_vision_select_layer": -99}, "vision_feature_layer: is -99, the encoder has 3 layers"),
    ],
)
def test_what_a_classic_config_says_is_understood_or_refused(tmp_path, changes, said):
    folder, encoder = write_classic(tmp_path, **changes)
    message = refusal(folder, vision_tower=encoder)
    assert said in message
    assert "config.json" in message


def test_keys_without_meaning_change_nothing(tmp_path):
    dead = {"mm_resampler_type": None, "unfreeze_mm_vision_tower": False, "max_length": 4096, "pretraining_tp": 1}
    folder, encoder = write_classic(tmp_path, **dead)
    assert open_checkpoint(folder, vision_tower=encoder).config.image_token_id > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(vision_feature_strategy="full"), "did you mean 'vision_feature_select_strategy'?"),
        (lambda raw: raw["text_config"].update(atention_bias=True), "config.json: text_config: 'atention_bias'"),
        (lambda raw: raw["vision_config"].update(window=3), "config.json: vision_config: 'window': 3"),
        (lambda raw: raw["vision_config"].update(patch_size=10**30), "config.json: "),
        (lambda raw: raw.update(text_config=3), "config.json: "),
        (lambda raw: raw.update(model_type=["llavakit"]), "model_type is ['llavakit'], not a string"),
    ],
)
def test_what_our_own_config_says_is_understood_or_refused(own, change, said):
    raw = json.loads((own / "config.json").read_text())
    change(raw)
    (own / "config.json").write_text(json.dumps(raw))
    assert said in refusal(own)


def test_keys_of_the_encoders_own_folder_count(source, tmp_path):
    folder, encoder = write_classic(tmp_path)
    raw = json.loads((encoder / "config.json").read_text())
    raw["vision_config"]["rotary"] = True
    (encoder / "config.json").write_text(json.dumps(raw))
    assert "encoder 'encoder': 'rotary': True is not understood" in refusal(folder, vision_tower=encoder)


# Tensors


def shard(own: Path) -> tuple[dict, dict]:
    """Split the weights into two shards with an index."""
    state = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own_names in halves.items():
        save_file({name: state[name] for name in own_names}, own / file)
    return state, {name: file for file, own_names in halves.items() for name in own_names}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: None, "weight_map is None"),
        (lambda m: [1], "weight_map is [1]"),
        (lambda m: {}, "weight_map is {}"),
        (lambda m: m | {"x": 3}, "'x' is in 3, it should be a file of this folder"),
        (lambda m: m | {"x": ["a.safetensors"]}, "'x' is in ['a.safetensors']"),
        (lambda m: m | {"x": "../a.safetensors"}, "'x' is in '../a.safetensors'"),
        (lambda m: m | {"x": "/etc/passwd"}, "'x' is in '/etc/passwd'"),
        (lambda m: m | {"x": "c.safetensors"}, "c.safetensors: missing"),
        (lambda m: m | {"x": "a.safetensors"}, "names 'x', but a.safetensors does not hold it"),
        (lambda m: dict.fromkeys(m, "a.safetensors"), "but a.safetensors does not hold it"),
        (lambda m: {n: f for n, f in m.items() if "lm_head" not in n}, "does not name 'lm_head.weight'"),
    ],
)
def test_broken_weight_maps_are_one_line(own, change, said):
    _, weight_map = shard(own)
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    build(open_checkpoint(own))
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": change(weight_map)}))
    assert said in refusal(own)


def test_a_tensor_in_two_shards_is_refused(own):
    state, weight_map = shard(own)
    doubled = {name: state[name] for name, file in weight_map.items() if file == "b.safetensors"}
    save_file(doubled | {"lm_head.weight": state["lm_head.weight"] + 1}, own / "b.safetensors")
    save_file(
        {n: state[n] for n, f in weight_map.items() if f == "a.safetensors"}
        | {"lm_head.weight": state["lm_head.weight"]},
        own / "a.safetensors",
    )
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "both hold 'lm_head.weight'" in refusal(own)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(own, tmp_path, value, dtype):
    state = load_file(own / "model.safetensors")
    bad = state["model.language_model.norm.weight"].to(dtype)
    bad[3] = value
    save_file(state | {"model.language_model.norm.weight": bad}, own / "model.safetensors")
    assert "'model.language_model.norm.weight' holds values that are not finite" in refusal(own)
    with pytest.raises(CheckpointError, match="not finite"):
        convert(own, tmp_path / "out", to="original")
    assert not (tmp_path / "out").exists()


def test_what_a_pickle_holds_beside_tensors_is_refused(tmp_path):
    folder, encoder = write_classic(tmp_path)
    file = folder / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(file) | {"epoch": 3}, file)
    assert "'epoch' is a int, it should be a tensor" in refusal(folder, vision_tower=encoder)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(own, tmp_path):
    change_json(own / "config.json", tie_word_embeddings=True)
    assert "ties lm_head.weight to model.language_model.embed_tokens.weight" in refusal(own)
    state = load_file(own / "model.safetensors")
    table = state["model.language_model.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": table.clone()}, own / "model.safetensors")
    model = build(open_checkpoint(own))
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


# Writing


def test_everything_is_on_the_disk_before_it_is_published(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def note(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "model").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with atomic_folder(tmp_path / "model") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "weights").write_text("w")
        (scratch / "sub" / "config").write_text("c")
    before = {Path(name).relative_to(scratch).as_posix() for name, published in synced if not published}
    assert before == {".", "sub", "weights", "sub/config"}
    assert synced[-1] == (str(tmp_path), True)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    (tmp_path / ".model.previous").mkdir()
    (tmp_path / ".model.previous" / "weights").write_text("old")

    def fail() -> None:
        with atomic_folder(tmp_path / "model"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "model" / "weights").read_text() == "old"
