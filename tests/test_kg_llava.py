"""KG-LLaVA: golden figures, triplets, datastore, training records, MedCLIP, the captioner, recipes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_training import write_tokenizer
from transformers import CONFIG_MAPPING, AutoModel

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.conversation.turns import TextDelta, TraceEvent
from llavakit.data.preparation import prepare
from llavakit.errors import CheckpointError, RecordError, UserError
from llavakit.generation.responder import Responder
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import write_world
from llavakit.proof.golden import find_cases, run_case
from llavakit.retrieval.encoder import StoreEncoder, load_encoder
from llavakit.retrieval.retriever import StoreRetriever
from llavakit.retrieval.store import Store
from llavakit.system import get_system
from llavakit.systems.kg_llava import radgraph, reports
from llavakit.systems.kg_llava.checkpoint import ClipCaption
from llavakit.systems.kg_llava.cost import cost
from llavakit.systems.kg_llava.datastore import neighbours_of_others, store_captions
from llavakit.systems.kg_llava.medclip import TEXT, VISION, MedClip, read_medclip, write_medclip
from llavakit.systems.kg_llava.prompts import pathologies, with_triplets
from llavakit.systems.kg_llava.responder import WithTriplets
from llavakit.systems.kg_llava.triplets import Caption, Triplet, parse, read_captions
from llavakit.training.build import build_meta
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.training.run import train
from llavakit.training.scaling import scale

GOLDEN = Path(__file__).parent / "golden" / "kg-llava"
SIDE = 16
TINY_TEXT = {"vocab_size": 80, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_TEXT |= {"intermediate_size": 32, "max_position_embeddings": 64}
TINY_VISION = {"image_size": SIDE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
TINY_VISION |= {"window_size": 2}


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


# Triplets


def test_triplets_are_read_in_both_spellings_and_written_in_one():
    triplet = Triplet("left opacity", "suggestive_of", "atelectasis")
    assert (
        parse("left opacity suggestive_of atelectasis") == parse("left opacity suggestive of atelectasis") == [triplet]
    )
    assert parse(str(triplet)) == [triplet]
    assert parse("a suggestive_of b; c located_at d;.") == [
        Triplet("a", "suggestive_of", "b"),
        Triplet("c", "located_at", "d"),
    ]
    assert parse(" ; ") == []


def write(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("triplets", "message"),
    [
        (["opacity causes_by edema"], "relation 'causes_by' is unknown"),
        ([["a", "treats", "b"]], "relation 'treats' is unknown; known: suggestive_of, located_at, modify"),
        (["no triplet"], "'no triplet': is no triplet"),
        (["suggestive_of edema"], "is no triplet"),
        ([3], "must be text or"),
        ({"a": 1}, "must be text or a list"),
        (None, "must be text or a list"),
    ],
)
def test_a_file_of_triplets_with_something_else_is_one_line(tmp_path, triplets, message):
    path = write(tmp_path / "t.json", [{"img_id": "a", "split": "train", "triplets": triplets}])
    with pytest.raises(RecordError, match=f"t.json:1: triplets.*{message}"):
        read_captions(path)


def test_captions_are_those_of_a_split_with_the_relation_that_counts(tmp_path):
    records = [
        {"img_id": 1, "split": "train", "triplets": "a suggestive_of b; c suggestive of d", "patient_ID": "p1"},
        {"img_id": "2", "split": "test", "triplets": ["x suggestive_of y"]},
        {"img_id": "3", "split": "train", "triplets": [["a", "suggestive of", "b"], "e located_at f"], "study_id": 7},
        {"img_id": "4", "split": "train"},
        {"img_id": "5", "split": "train", "triplets": []},
    ]
    path = write(tmp_path / "t.json", records)
    assert read_captions(path) == [
        Caption("a suggestive_of b; c suggestive of d", "1", {"patient": "p1"}),
        Caption("a suggestive_of b", "3", {"study": "7"}),
    ]
    rare_left_out = read_captions(path, least_patients=2)
    assert [caption.text for caption in rare_left_out] == ["a suggestive_of b"] * 2
    with pytest.raises(UserError, match="no triplets of the split 'val'"):
        read_captions(path, split="val")


def test_output_of_radgraph_is_a_file_of_triplets(tmp_path):
    annotations = json.loads((GOLDEN / "radgraph_postprocess" / "inputs.json").read_text())["annotations"]
    path = write(tmp_path / "r.json", annotations)
    found = read_captions(path, join=False)
    assert [caption.text for caption in found] == [
        "opacities suggestive_of atelectasis",
        "opacities suggestive_of infection",
        "opacities suggestive_of Pneumothorax",
    ]
    annotations[0]["0"]["entities"]["1"]["relations"] = [["touches", "3"]]
    with pytest.raises(RecordError, match=r"r.json:1: entities: entity 1: relation 'touches' is unknown"):
        read_captions(write(path, annotations))


def entity(tokens, start, *relations, label="Observation::definitely present"):
    return {
        "tokens": tokens,
        "label": label,
        "start_ix": start,
        "end_ix": start,
        "relations": [list(r) for r in relations],
    }


def test_observations_survive_circles_and_missing_targets():
    circle = {"1": entity("mild", 0, ("modify", "2")), "2": entity("edema", 1, ("modify", "1")), "3": entity("x", 2)}
    assert [found["observation"] for found in radgraph.observations({"entities": circle})] == ["x"]
    with pytest.raises(UserError, match="entity 1: relation to '9', which is no entity"):
        radgraph.observations({"entities": {"1": entity("a", 0, ("modify", "9"))}})
    measured = {"1": entity("size", 0, label="Observation::measurement::uncertain")}
    assert radgraph.observations({"entities": measured})[0]["tags"] == ["uncertain"]


# Reports


def test_sections_of_a_report_begin_where_the_text_says():
    report = " FINAL\n INDICATION:  Cough.\n\n FINDINGS:\n \n Clear.  No effusion.\n\n IMPRESSION:\n\n Normal."
    for section in reports.sections(report):
        assert report[section.start :].startswith(section.text)
    assert reports.explanations(report) == ["Clear.", "No effusion.", "Normal."]
    assert [section.name for section in reports.sections("")] == ["full report"]
    assert reports.explanations("") == []


def test_the_last_paragraph_is_a_section_where_no_findings_are():
    found = reports.sections("x\n HISTORY: a\n \n b\n \n c")
    assert [(section.name, section.text) for section in found[1:]] == [
        ("history", "a"),
        ("last_paragraph", " b\n \n c"),
    ]


# Prompts


def test_prompts_without_labels_or_triplets_are_legal():
    assert pathologies([[1, 0, 0]] * 10) == ""
    assert with_triplets([], "why?").startswith("The image-specific triplets from the knowledge graph are: . And")
    assert with_triplets(list("abcdefghi"), "why?", 3).count(";") == 2


def labels(**found):
    rows = [[1, 0, 0] for _ in range(10)]
    for place, certainty in found.items():
        rows[int(place[1:])] = [0, int(certainty == "uncertain"), int(certainty == "positive")]
    return rows


def test_broken_records_are_named(tmp_path):
    good = {"img_id": "a", "img_path": "a.png", "split": "train", "nle": "x", "img_labels": labels()}
    retrieved = write(tmp_path / "r.json", {"a": ["t"]})
    for field, value, message in (
        ("img_labels", labels() * 2, "img_labels: is .*up to 10 triples"),
        ("img_labels", [[1, 0]] * 10, "img_labels: is .*up to 10 triples"),
        ("nle", None, "nle: is None, it should be text"),
        ("img_id", None, "img_id: is None"),
    ):
        source = write(tmp_path / "s.json", [{**good, field: value}, {**good, "img_id": "b"}])
        with pytest.raises(RecordError, match=rf"s.json:1: {message}"):
            prepare("kg_conversations", source, tmp_path / "out.json", retrieved=str(retrieved))
        found = prepare(
            "kg_conversations", source, tmp_path / "out.json", retrieved=str(retrieved), on_bad_record="skip"
        )
        assert (found["written"], found["without_triplets"], len(found["left_out"])) == (1, 1, 1)
    write(retrieved, {"a": "t"})
    with pytest.raises(UserError, match="'a': is 't', it should be a list of triplets"):
        prepare("kg_conversations", write(tmp_path / "s.json", [good]), tmp_path / "o.json", retrieved=str(retrieved))


# Datastore


def captions(count, views=2):
    """Two pictures a study, two studies a patient."""
    return [
        Caption(f"sign{i} suggestive_of d", f"i{i}", {"study": f"s{i // views}", "patient": f"p{i // (2 * views)}"})
        for i in range(count)
    ]


def test_a_picture_gets_no_caption_of_its_own_study_or_patient(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(24, 8)).astype("f4")
    store = store_captions(captions(24), vectors, tmp_path / "store")
    own = {"image": "i5", "study": "s2", "patient": "p1"}
    published = neighbours_of_others(store, vectors[5:6], [own], searched=24, kept=20)[0]
    assert "i5" not in [hit.entry.page for hit in published]
    assert "i4" in [hit.entry.page for hit in published]  # the other view of the study
    strict = neighbours_of_others(store, vectors[5:6], [own], searched=None, kept=20, exclude=("study", "patient"))[0]
    assert not {"i4", "i5", "i6", "i7"} & {hit.entry.page for hit in strict}
    assert len(strict) == 20
    scores = [hit.score for hit in strict]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(UserError, match="'i5' has 20 neighbours of others, it needs 21"):
        neighbours_of_others(store, vectors[5:6], [own], searched=None, kept=21, exclude=("patient",))
    with pytest.raises(UserError, match="exclude 'hospital': must be any of image, study, patient"):
        neighbours_of_others(store, vectors[5:6], [own], exclude=("hospital",))
    with pytest.raises(UserError, match="nothing to store"):
        store_captions([], vectors, tmp_path / "empty")


def test_the_order_of_captions_changes_numbers_and_no_texts(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(24, 8)).astype("f4")
    order = np.random.default_rng(1).permutation(24)
    one = store_captions(captions(24), vectors, tmp_path / "one")
    other = store_captions([captions(24)[i] for i in order], vectors[order], tmp_path / "other")
    query = vectors[:1] + 0.1
    texts = [[hit.entry.text for hit in store.search(query, 7)[0]] for store in (one, other)]
    assert texts[0] == texts[1]
    assert (order[other.neighbours(query, 7)[1]] == one.neighbours(query, 7)[1]).all()


def test_a_folder_of_the_original_code_becomes_a_store(tmp_path):
    faiss = pytest.importorskip("faiss")
    vectors = np.random.default_rng(0).normal(size=(9, 8)).astype("f4")
    faiss.normalize_L2(vectors)
    index = faiss.IndexFlatIP(8)
    index.add(vectors)
    folder = tmp_path / "datastore"
    folder.mkdir()
    faiss.write_index(index, str(folder / "kg_nle_index"))
    texts = [f"sign{i} suggestive_of d" for i in range(9)]
    write(folder / "kg_nle_index_captions.json", texts)
    for name, source in (("a", folder), ("b", folder / "kg_nle_index")):
        assert prepare("kg_datastore", source, tmp_path / name)["captions"] == 9
        store = Store.open(tmp_path / name)
        assert (store.neighbours(vectors[:3] + 0.2, 9)[1] == index.search(vectors[:3] + 0.2, 9)[1]).all()
        assert store.entries([4])[0].text == texts[4]
    write(folder / "kg_nle_index_captions.json", texts[:5])
    with pytest.raises(UserError, match=r"holds 9 vectors, kg_nle_index_captions.json 5 captions"):
        prepare("kg_datastore", folder, tmp_path / "c")
    (folder / "kg_nle_index").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not an index of faiss"):
        prepare("kg_datastore", folder, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.fixture
def medclip_folder(tmp_path):
    torch.manual_seed(0)
    net = MedClip(TINY_TEXT, TINY_VISION, 8)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path / "medclip"
    folder.mkdir()
    write_tokenizer(folder)
    write_medclip(net, folder)
    return folder


def test_from_pictures_and_triplets_to_training_records(medclip_folder, tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 24), np.uint8)).save(tmp_path / f"{number}.png")
        records.append(
            {
                "img_id": str(number),
                "img_path": f"{number}.png",
                "split": "train",
                "nle": "because",
                "img_labels": labels(d2="positive"),
                "study_id": number // 2,
                "triplets": f"red {'white ' * number}suggestive_of square",
            }
        )
    source = write(tmp_path / "records.json", records)
    store, retrieved, train = tmp_path / "store", tmp_path / "retrieved.json", tmp_path / "train.json"
    assert prepare("kg_datastore", source, store, encoder=str(medclip_folder)) == {
        "captions": 12,
        "pictures": 12,
        "left_out": [],
    }
    assert prepare("kg_triplets", source, retrieved, store=str(store), images=str(tmp_path))["pictures"] == 12
    found = json.loads(retrieved.read_text())
    for number in range(12):
        others = {records[number]["triplets"], records[number ^ 1]["triplets"]}
        assert len(found[str(number)]) == 7
        assert not others & set(found[str(number)])
    assert prepare("kg_conversations", source, train, retrieved=str(retrieved))["written"] == 12
    first = json.loads(train.read_text())[0]
    assert first["conversations"][0]["value"].startswith(
        f"<image>\nThe image-specific triplets from the knowledge graph are: {found['0'][0]}; "
    )
    assert "positive Edema" in first["conversations"][0]["value"]
    with pytest.raises(UserError, match="encoder: missing"):
        prepare("kg_datastore", source, tmp_path / "other")


# MedCLIP


def test_masked_vectors_do_not_depend_on_their_batch(medclip_folder):
    encoder, published = load_encoder(medclip_folder), load_encoder(medclip_folder, mask=False)
    short, long = "red square", "red white blue square there is a red picture"
    alone, together = encoder.texts([short])[0], encoder.texts([short, long])[0]
    np.testing.assert_allclose(alone, together, atol=1e-6)
    assert abs(published.texts([short])[0] - published.texts([short, long])[0]).max() > 1e-4
    assert encoder.identity != published.identity
    image = encoder.images([Image.new("RGB", (30, 10), "white")])
    assert image.shape == (1, 8)
    np.testing.assert_allclose(np.linalg.norm(image), 1, atol=1e-5)


def test_the_published_file_becomes_a_folder(tmp_path, monkeypatch):
    from llavakit.systems.kg_llava import medclip

    monkeypatch.setattr(medclip, "TEXT", TINY_TEXT)
    monkeypatch.setattr(medclip, "VISION", TINY_VISION)
    monkeypatch.setattr(medclip, "WIDTH", 8)
    net = MedClip(TINY_TEXT, TINY_VISION, 512)
    state = net.published_state() | {"text_model.model.embeddings.position_ids": torch.arange(64)[None]}
    assert any(name.endswith("attention.self.relative_position_bias_table") for name in state)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "published").mkdir()
    torch.save(state, tmp_path / "published" / "pytorch_model.bin")
    done = prepare("medclip", tmp_path / "published", tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert done["tensors"] == len(state) - 1
    again = read_medclip(tmp_path / "out")
    assert all(torch.equal(tensor, again.published_state()[name]) for name, tensor in net.published_state().items())
    state.pop("logit_scale")
    torch.save(state, tmp_path / "published" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="'logit_scale' missing"):
        prepare("medclip", tmp_path / "published", tmp_path / "other", tokenizer=str(tmp_path / "tokenizer"))
    assert not (tmp_path / "other").exists()


def test_published_sizes():
    with torch.device("meta"):
        net = MedClip(TEXT, VISION)
    assert net.vision_model.projection_head.weight.shape == (512, 768)
    assert net.text_model.projection_head.weight.shape == (512, 768)
    rows = {row.name: row.value for row in cost().rows}
    assert rows["LoRA of rank 128"] == 319_815_680
    assert rows["linear weights of the 32 layers"] == 6_476_005_376
    assert rows["one query"] == 18_952_192


# The captioner


MAPPER = {"prefix_length": 4, "clip_length": 3, "num_layers": 2, "heads": 2, "mlp_ratio": 2.0, "qkv_bias": False}
GPT2 = {"vocab_size": 80, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


@pytest.fixture
def captioner_folder(tmp_path):
    """ClipCap's files with an encoder beside, as llavakit exports them."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    raw = {"model_type": "clip_caption", "dim_clip": 8, "vision": TINY_VISION, "mapper": MAPPER, "gpt2": GPT2}
    from llavakit.model.modeling import LlavakitForConditionalGeneration

    config = ClipCaption().read_config(raw, {})
    net = LlavakitForConditionalGeneration(config)
    state = {name: tensor for name, tensor in net.state_dict().items() if name != "lm_head.weight"}
    folder = tmp_path / "captioner"
    folder.mkdir()
    published = {name: tensor.clone() for name, tensor in ClipCaption().write_state(config, state)}
    assert {"clip_project.prefix_const", "gpt.transformer.wte.weight", "vision_model.projection_head.weight"} <= set(
        published
    )
    save_file(published, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder)
    return folder, published


def test_the_captioner_opens_and_comes_back(captioner_folder, tmp_path):
    folder, published = captioner_folder
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.layout, checkpoint.config.connector["type"]) == ("kg-llava (original)", "prefix_mapper")
    net = build(checkpoint)
    assert torch.equal(net.model.multi_modal_projector.prefix_const, published["clip_project.prefix_const"])
    convert(folder, tmp_path / "own", to="llavakit")
    convert(tmp_path / "own", tmp_path / "again", to="original")
    from safetensors.torch import load_file

    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(published)
    assert all(torch.equal(tensor, again[name]) for name, tensor in published.items())


def test_clipcaps_own_file_says_its_sizes(captioner_folder, tmp_path):
    _, published = captioner_folder
    folder = tmp_path / "clipcap"
    folder.mkdir()
    own = {name: tensor for name, tensor in published.items() if not name.startswith("vision_model.")}
    torch.save(own | {"gpt.lm_head.weight": own["gpt.transformer.wte.weight"]}, folder / "coco_prefix.pt")
    raw = ClipCaption().implied_config(folder, None)
    assert raw["mapper"] == MAPPER | {"heads": 8}
    assert raw["dim_clip"] == 8
    assert {key: raw["gpt2"][key] for key in ("vocab_size", "n_embd", "n_layer", "n_positions")} == {
        key: GPT2[key] for key in ("vocab_size", "n_embd", "n_layer", "n_positions")
    }
    torch.save({"clip_project.model.0.weight": torch.zeros(2, 2)}, folder / "coco_prefix.pt")
    with pytest.raises(CheckpointError, match="its mapper is an MLP"):
        ClipCaption().implied_config(folder, None)


def test_published_recipes_build():
    folder = get_system("kg-llava").recipe.parent
    for name in ("recipe.yaml", "captioner.yaml"):
        net = build_meta(load_recipe(folder / name))
        assert net.model.multi_modal_projector is not None


# Answering


class Grey(StoreEncoder):
    """The brightness of pictures, and how often a text says bright."""

    name, identity, dimension = "grey", "1", 2

    def texts(self, texts):
        return np.array([[1.0, text.count("bright")] for text in texts], np.float32)

    def images(self, images):
        return np.array([[1.0, image.convert("L").getpixel((0, 0)) / 100] for image in images], np.float32)


class Echo(Responder):
    def run(self, call):
        yield TextDelta(text=call.messages[-1]["content"][-1]["text"])


def test_the_responder_puts_triplets_in_front_of_the_question(tmp_path):
    texts = ["dark suggestive_of a", "bright bright suggestive_of b"]
    store = Store.create(tmp_path / "store", 2, encoder=Grey().describe())
    from llavakit.systems.kg_llava.datastore import entry

    store.add([entry(Caption(text, str(i))) for i, text in enumerate(texts)], Grey().texts(texts))
    chat = WithTriplets(Echo(), store=StoreRetriever(store, Grey()), triplets=1)
    picture = {"type": "image", "image": Image.new("L", (4, 4), 255)}
    question = {"type": "text", "text": "positive Edema, uncertain Pneumonia"}
    events = list(chat.respond([{"role": "user", "content": [picture, question]}]))
    assert next(e for e in events if isinstance(e, TraceEvent)).data["triplets"] == texts[1:]
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == (
        "The image-specific triplets from the knowledge graph are: bright bright suggestive_of b. And for the given "
        "image, Which signs show that the patient has positive Edema, uncertain Pneumonia?"
    )
    assert chat.chat([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]) == "Hello"
    with pytest.raises(UserError, match="triplets 0: must be a positive number"):
        WithTriplets(Echo(), triplets=0)
    empty = Store.create(tmp_path / "empty", 2, encoder=Grey().describe())
    with pytest.raises(UserError, match="the store is empty"):
        WithTriplets(Echo(), store=StoreRetriever(empty, Grey())).chat(
            [{"role": "user", "content": [picture, question]}]
        )


def test_the_captioners_recipe_made_small_trains_and_answers(tmp_path):
    world = tmp_path / "world"
    write_world("scene", world, n=8, seed=0, size=32)
    texts = json.loads((world / "texts.json").read_text())
    tiny_tokenizer(texts, specials=["<image>"]).save_pretrained(world / "tokenizer")
    steps = {"max_steps": 2, "batch_size": 2, "workers": 0, "log_steps": 1}
    recipe = load_recipe(get_system("kg-llava").recipe.parent / "captioner.yaml")
    raw = scale(recipe, vocab=1300, image_size=SIDE, stages=steps).model_dump()
    raw["parts"]["vision_config"] = {"model_type": "medclip_vision", "swin": TINY_VISION, "projection_dim": 8}
    raw["parts"]["media"]["image"]["views"]["size"] = SIDE
    raw["parts"]["tokenizer"] = str(world / "tokenizer")
    raw["data"] = [{"name": "explanations", "path": str(world / "train.json"), "images": str(world)}]
    result = train(parse_recipe(raw | {"output": str(tmp_path / "run")}), console=Console(quiet=True))
    chat = llavakit.load(result.final)
    question = [{"type": "image", "image": Image.new("RGB", (40, 20))}, {"type": "text", "text": "What is there?"}]
    assert isinstance(chat.chat([{"role": "user", "content": question}], max_new_tokens=2), str)
    found = convert(result.final, tmp_path / "published", to="original")
    assert found is not None
    assert open_checkpoint(tmp_path / "published").layout == "kg-llava (original)"


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip_vision_model"])
def test_any_vit_fits_into_the_tower(tmp_path, kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4}
    config = CONFIG_MAPPING[kind](**sizes, **({} if kind == "dinov2" else {"intermediate_size": 32}))
    AutoModel.from_config(config).save_pretrained(tmp_path / "tower")
    raw = scale(load_recipe(get_system("kg-llava").recipe), vocab=1300, image_size=SIDE).model_dump()
    raw["parts"] |= {"vision_config": None, "init": {"vision_tower": str(tmp_path / "tower")}}
    raw["parts"]["media"]["image"]["views"] |= {"size": SIDE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    net = build_meta(parse_recipe(raw))
    assert net.config.vision_config.model_type == kind
    assert net.model.multi_modal_projector.vision_width == 16
