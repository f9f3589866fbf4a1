"""Med42-v2: golden figures, template, recipe, likelihood ranking, ratings."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_server import small_chat
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.conversation.template import get_template
from llavakit.data.packing import Piece, chunks
from llavakit.errors import RecordError, UserError
from llavakit.evaluation.metrics.elo import bootstrap, bradley_terry, online_elo
from llavakit.evaluation.run import evaluate
from llavakit.evaluation.score import score
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.med42_v2.templates import CARD_SYSTEM
from llavakit.training.build import build_meta
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.training.run import train
from llavakit.training.scaling import scale

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")

GOLDEN = Path(__file__).parent / "golden" / "med42-v2"
QUIET = Console(quiet=True)
MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


def test_the_template_brings_the_card_s_system_text_and_the_page_its_notice():
    text, spans = get_template("med42_v2").render([{"role": "user", "content": [{"type": "text", "text": " a "}]}])
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful")
    assert text.endswith("share false information.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>")
    assert spans == []
    system = get_system("med42-v2")
    assert "not ready for clinical use" in system.readme.read_text().lower().replace("\n", " ")
    assert "not ready for clinical use" in system.recipe.read_text().lower()


# Chunks


def test_chunks_keep_every_token_but_the_tail():
    lengths = [3, 9, 1, 4, 2]
    rows = chunks([7, 5, 3, 1, 0], lengths, 4)
    assert [sum(piece.end - piece.begin for piece in row) for row in rows] == [4, 4, 4, 4]
    tokens = [(int(piece), place) for row in rows for piece in row for place in range(piece.begin, piece.end)]
    assert (
        tokens == [(n, place) for n, size in zip([7, 5, 3, 1, 0], lengths, strict=True) for place in range(size)][:16]
    )
    assert chunks([1], [3], 4) == []
    piece = Piece(3, 1, 2)
    assert piece == 3
    assert (piece.__reduce__()[0](*piece.__reduce__()[1]).end, hash(piece)) == (2, hash(3))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("med42")
    names = ["anna", "ben", "cara", "dan"]
    drugs = ["aspirin", "insulin", "heparin", "morphine"]
    turns, pairs = [], []
    for number in range(16):
        name, drug = names[number % 4], drugs[number % 4]
        question = {"role": "user", "content": f"what helps {name} ?"}
        answer = {"role": "assistant", "content": f"give {drug} " * (1 + number % 3)}
        turns.append({"messages": [question, answer]})
        pairs.append({"prompt": [question], "chosen": f"give {drug}", "rejected": "i cannot say"})
    for name, rows in (("medical", turns), ("preference", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [*names, *drugs, "what helps ? give i cannot say system user assistant"]
    tiny_tokenizer(texts, specials=MARKS).save_pretrained(folder / "tokenizer")
    return folder


def small(data, out, packing="stream", **stage):
    steps = {"max_steps": 3, "batch_size": 2, "workers": 0, "shard": False, "log_steps": 1, "bf16": False}
    recipe = scale(load_recipe(get_system("med42-v2").recipe), vocab=600, stages=steps | {"max_length": 64} | stage)
    raw = recipe.model_dump()
    for source in raw["data"]:
        source["path"] = str(data / ("preference.jsonl" if "preference" in source["name"] else "medical.jsonl"))
    raw["parts"]["tokenizer"] = str(data / "tokenizer")
    raw["stages"][0]["packing"] = packing
    for own in raw["stages"][1:]:
        own |= {"max_length": None, "learning_rate": 1e-4}
    return parse_recipe(raw | {"output": str(out)})


def test_the_recipe_made_small_trains_through_four_stages(data, tmp_path):
    result = train(small(data, tmp_path / "run"), console=QUIET)
    assert [stage.name for stage in result.stages] == ["instruct", "align-1", "align-2", "align-3"]
    for stage in result.stages[1:]:
        losses = [entry["loss"] for entry in stage.metrics["log"]]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
        assert losses[-1] != losses[0]
    chat = llavakit.load(result.final)
    assert isinstance(chat.chat([{"role": "user", "content": "what helps anna ?"}], max_new_tokens=3), str)
    scores = chat.score([{"role": "user", "content": "what helps anna ?"}], ["give aspirin", "give insulin"])
    assert len(scores) == 2


def test_published_scale():
    recipe = load_recipe(get_system("med42-v2").recipe)
    assert sum(p.numel() for p in build_meta(recipe).parameters()) == 8_030_261_248
    assert [stage.optimizer for stage in recipe.stages[1:]] == ["rmsprop"] * 3
    rows = {(row.group, row.name): row.value for row in get_system("med42-v2").load("cost")().rows}
    assert rows["Llama-3-8B", "linear layers on 8,192 tokens"] == 122_956_323_749_888
    assert rows["Llama-3-8B", "attention on 8,192 tokens, full square"] == 35_184_372_088_832
    assert rows["Llama-3-70B", "parameters"] == 70_553_706_496
    assert (rows["Llama-3-8B", "cache, 16 bit"], rows["Llama-3-70B", "cache, 16 bit"]) == (131_072, 327_680)
    assert rows["Llama-3-8B", "tokens of instruction tuning"] == 1_394_868_224


def test_a_stream_attends_across_samples_and_packed_rows_do_not(data, tmp_path):
    curves = {}
    for packing in ("stream", True):
        recipe = small(data, tmp_path / str(packing), packing, max_steps=1)
        recipe = recipe.model_copy(update={"stages": recipe.stages[:1]})
        curves[packing] = train(recipe, console=QUIET).stages[0].metrics["log"][0]["loss"]
    assert all(map(math.isfinite, curves.values()))
    assert curves["stream"] != pytest.approx(curves[True], abs=1e-6)
    with pytest.raises(UserError, match=r"stage 'instruct': \d+ tokens do not fill a chunk of 100000"):
        train(small(data, tmp_path / "long", max_length=100_000), console=QUIET)


# Evaluation


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [
        {"question_id": 1, "text": "Which drug?", "options": ["A. red", "B. a blue disc", "C. no"], "answer": "B"},
        {"question_id": 2, "text": "And now?", "options": ["A. red", "B. no"], "answer": 0, "group": "anatomy"},
        {"question_id": 3, "text": "At last?", "options": ["A. red", "B. no"], "answer": "B. no", "group": "anatomy"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_groups_are_told_apart_by_their_text(tmp_path):
    likelihoods = [{"sum": own, "characters": 6, "tokens": 2} for own in (-1, -2)]
    groups = [1, "1", ["a"], None]
    asked = [{"question_id": n, "text": "?", "options": ["A. a", "B. b"]} for n in range(4)]
    asked = [row | {"answer": n % 2, "group": group} for n, (row, group) in enumerate(zip(asked, groups, strict=True))]
    given = [{"question_id": n, "text": "A. a", "likelihoods": likelihoods} for n in range(4)]
    for name, rows in {"gold": asked, "given": given}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = score("likelihood", tmp_path / "given.jsonl", tmp_path / "gold.jsonl")["metrics"]
    assert metrics["by_group"] == {"1": 50.0, "['a']": 100.0}
    assert metrics["average"] == 75.0


def test_options_are_ranked_by_their_likelihood(questions, tmp_path):
    chat = small_chat()
    result = evaluate(chat, "likelihood", questions, tmp_path / "p.jsonl", console=QUIET)
    metrics = result["metrics"]
    assert metrics["count"] == 3
    assert metrics["accuracy"] == metrics["accuracy_sum"]
    assert set(metrics["by_group"]) == {"anatomy"}
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    scores = chat.score([{"role": "user", "content": "Which drug?"}], ["A. red", "B. a blue disc", "C. no"])
    assert [own["sum"] for own in rows[0]["likelihoods"]] == pytest.approx([own.sum for own in scores], abs=1e-4)
    assert [own["characters"] for own in rows[0]["likelihoods"]] == [6, 14, 5]
    by = score("likelihood", tmp_path / "p.jsonl", questions, by="per_token")["metrics"]
    assert by["accuracy"] == metrics["accuracy_per_token"]
    assert evaluate(chat, "likelihood", questions, tmp_path / "p.jsonl", console=QUIET)["asked"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["A. red"]}, "options: must be at least two to choose from, there is 1"),
        ({"options": ["A", "A"]}, "options: holds the same option twice"),
        ({"options": ["A", " "]}, "options: must be texts that are not empty"),
        ({"answer": "D"}, "answer: must be an index from 0 to 2, a letter, or one of the options"),
        ({"answer": 3}, "answer: must be an index from 0 to 2"),
    ],
)
def test_broken_option_lists(questions, tmp_path, change, message):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[0] |= change
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecordError, match=message):
        evaluate(small_chat(), "likelihood", questions, tmp_path / "p.jsonl", console=QUIET)


def test_ratings_and_their_intervals(tmp_path):
    models = ["a", "b", "c"]
    battles = [("a", "b", "a")] * 3 + [("a", "b", "b")] + [("b", "c", "tie")] * 4 + [("c", "a", "b")] * 2
    ratings = bradley_terry(models, [*battles, ("c", "a", "a")])
    assert ratings["a"] > ratings["b"]
    assert sum(ratings.values()) == pytest.approx(3000)
    assert bradley_terry(["a", "b"], [("a", "b", "a")] * 3) is None  # a never lost: no maximum
    two = bradley_terry(["a", "b"], [("a", "b", "a")] * 3 + [("a", "b", "b")])
    assert two["a"] - two["b"] == pytest.approx(400 * math.log10(3))
    assert sum(online_elo(models, battles)[0].values()) == pytest.approx(3000)
    low, high = bootstrap(models, battles * 10)["a"]
    assert low < bradley_terry(models, battles)["a"] < high
    rows = [{"model_a": x, "model_b": y, "verdict": {"a": "first", "b": "second"}.get(w, w)} for x, y, w in battles]
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"verdict": None}]))
    found = score("arena", path)["metrics"]
    assert (found["count"], found["failed"]) == (10, 1)
    assert next(iter(found["models"])) == "a"
    assert torch.tensor([row["battles"] for row in found["models"].values()]).sum() == 20


def test_the_miniature_runs_and_is_judged_by_its_measurements():
    verdict = get_system("med42-v2").load("miniature")(seeds=(0,), steps=8)
    assert [one.metric for one in verdict.comparisons] == ["clinical facts ranked right", "probability of refusing"]
    assert verdict.comparisons[1].higher_is_better is False
    assert "against the tuned model" in verdict.notes


# Published files


def published_config(**sizes):
    """What the published config.json holds."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
        "use_cache": True,
        "vocab_size": 128256,
    } | sizes


def published_tensors(config):
    """Names and shapes of the published tensors."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = hidden // heads * config["num_key_value_heads"]
    found = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config["vocab_size"], hidden))
    found["model.norm.weight"] = (hidden,)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        found |= {f"{layer}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        found |= {f"{layer}self_attn.{name}_proj.weight": (width, hidden) for name in "kv"}
        found |= {f"{layer}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        found |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return found


def test_published_files_are_read_and_written_back(data, tmp_path):
    config = published_config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    ids = {name: tokenizer.convert_tokens_to_ids(MARKS[n]) for name, n in (("bos_token_id", 0), ("eos_token_id", 3))}
    config |= ids | {"vocab_size": len(tokenizer)}
    folder = tmp_path / "published"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    state = {name: torch.randn(shape) * 0.2 for name, shape in published_tensors(config).items()}
    names = sorted(state)
    parts = {f"model-0000{n + 1}-of-00004.safetensors": {k: state[k] for k in names[n::4]} for n in range(4)}
    for name, own in parts.items():
        save_file(own, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, own in parts.items() for key in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **ids}))
    chat = llavakit.load(folder, template="med42_v2", device="cpu")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    row = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(chat.model(input_ids=row).logits, model(row).logits.float(), atol=1e-5)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in chat.eos_token_ids
    text = chat.tokenizer.decode(chat.request([{"role": "user", "content": "what helps anna ?"}]).input_ids)
    assert text.count("<|begin_of_text|>") == 1
    assert "You are a second version of Med42" in CARD_SYSTEM
    assert text.count("<|start_header_id|>") == 3
    convert(folder, tmp_path / "ours", to="llavakit", template="med42_v2")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    written = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        written |= load_file(file)
    assert {name: tuple(own.shape) for name, own in written.items()} == published_tensors(config)
    assert all(torch.equal(written[name].float(), own) for name, own in state.items())
    for name in names[:1]:  # one tensor is gone
        broken = dict(index["weight_map"])
        file = broken.pop(name)
        save_file({k: v for k, v in parts[file].items() if k != name}, folder / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head"):
        llavakit.load(folder, template="med42_v2", device="cpu")


def test_published_shapes_are_those_of_the_model():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in published_config().items() if k != "torch_dtype"}))
    found = {name: tuple(own.shape) for name, own in model.state_dict().items()}
    assert found == published_tensors(published_config())
    assert sum(math.prod(shape) for shape in found.values()) == 8_030_261_248
    ours = build_meta(load_recipe(get_system("med42-v2").recipe))
    renamed = {name.replace("model.language_model.", "model."): tuple(p.shape) for name, p in ours.state_dict().items()}
    assert renamed == found


def test_labels_of_sequences_without_a_system_turn(tmp_path):
    folder = tmp_path / "sft_labels"
    shutil.copytree(GOLDEN / "sft_labels", folder)
    given = json.loads((folder / "inputs.json").read_text())

    def turn(role, *ids):
        return [128006, role, 128007, 271, *ids, 128009]

    sequences = [[128000, *turn(882, 4, 78191), *turn(78191, 5, 882)], [128000, *turn(882, 4), *turn(78191)]]
    labels = [[*[-100] * 11, 5, 882, 128009], [*[-100] * 11, 128009]]
    labels[0] = [-100, *labels[0]]
    outputs = json.loads((folder / "outputs.json").read_text())
    assert isinstance(outputs, list)
    (folder / "inputs.json").write_text(json.dumps(given | {"sequences": sequences}))
    (folder / "outputs.json").write_text(json.dumps(labels))
    report = run_case(folder)
    assert report.status == "passed", report.reason
