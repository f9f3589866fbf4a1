"""Box files by a detector: boxes in pixels once, tags, resume, broken records."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import (
    GroundingDinoConfig,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    PreTrainedTokenizerFast,
)

from llavakit.data.boxes import BoxFile
from llavakit.data.detection import jobs_of, write_boxes
from llavakit.errors import RecordError, UserError
from llavakit.media.regions import Region
from llavakit.vision.detection import Detector, parse_tags, tags_of_question

WORDS = ["a", "photo", "of", "red", "car", "dog", "tree", "."]


def tokenizer(**specials):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = [*specials.values(), "<unk>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in specials:
        ends = [(specials[name], known.index(specials[name])) for name in ("cls_token", "sep_token")]
        backend.post_processor = processors.TemplateProcessing(f"{ends[0][0]} $A {ends[1][0]}", None, ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", model_max_length=16, **specials)


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    folder, size = tmp_path_factory.mktemp("owl"), {"hidden_size": 16, "intermediate_size": 16}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 32, "max_position_embeddings": 16, "pad_token_id": 0, "eos_token_id": 1}
    vision = {**size, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
        folder
    )
    pil = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    Owlv2Processor(pil, tokenizer(pad_token="<pad>", eos_token="</s>")).save_pretrained(folder)
    return folder


def boxes_of(detector, raw, size):
    """What a detector makes of raw boxes (centre, width, height in fractions), all of one score."""
    width, height = size
    found = detector.processor.image_processor.post_process_object_detection
    logits = torch.full((1, len(raw), 1), 3.0)
    outputs = type("Raw", (), {"logits": logits, "pred_boxes": torch.tensor([raw])})()
    return found(outputs, threshold=0.1, target_sizes=[detector.target_size(width, height)])[0]["boxes"][0].tolist()


def test_an_owl_reads_tags_and_gives_corners_in_the_picture(owl):
    detector = Detector.load(owl, threshold=0.0)
    assert detector.prompts(["dog"]) == ["a photo of dog"]
    regions = detector(Image.new("RGB", (64, 48), "red"), ["red car", "dog"])
    assert len(regions) == 16
    assert {region.label for region in regions} <= {"red car", "dog"}
    assert all(place == int(place) for region in regions for place in region.box)
    # the picture is padded to a square below, so fractions are of the long side
    assert boxes_of(detector, [[0.5, 0.25, 0.5, 0.5]], (64, 48)) == pytest.approx([16, 0, 48, 32])
    assert Detector.load(owl, threshold=1.0)(Image.new("RGB", (9, 9)), ["dog"]) == []


def test_grounding_dino_reads_one_text_and_gives_corners_in_the_picture():
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    words = tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    processor = GroundingDinoProcessor(GroundingDinoImageProcessorPil(size={"height": 32, "width": 32}), words)
    ids = torch.tensor([words("red car . dog .").input_ids])

    class Raw:
        logits = torch.full((1, 2, ids.shape[1]), -9.0)
        pred_boxes = torch.tensor([[[0.5, 0.5, 0.25, 0.5], [0.1, 0.1, 0.4, 0.2]]])
        input_ids = ids

    Raw.logits[0, 0, 1:3] = 3.0
    Raw.logits[0, 1, 4] = 2.0

    class Network:
        config, device = GroundingDinoConfig(), "cpu"

        def __call__(self, **inputs):
            assert words.decode(inputs["input_ids"][0], skip_special_tokens=True).replace(" ", "") == "redcar.dog."
            return Raw()

    found = Detector(Network(), processor)(Image.new("RGB", (640, 480)), ["red car", "dog"])
    assert [region.label for region in found] == ["red car", "dog"]
    assert found[0].box == (240.0, 120.0, 400.0, 360.0)
    assert found[1].box == (-64.0, 0.0, 192.0, 96.0)


def test_a_folder_of_another_kind_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="no zero-shot detector"):
        Detector.load(tmp_path)


def test_tags():
    assert parse_tags("dog | Red Car | tree") == parse_tags("Dog, red car,tree") == ["dog", "red car", "tree"]
    asked = {
        "<image>\nHow many red cars are on the left of the tree?": ["red cars", "tree"],
        "What colour is the dog's bowl?\nAnswer the question using a single word or phrase.": ["dog's bowl"],
        "Is there a snowboard, or a surfboard, in the image?": ["snowboard", "surfboard"],
        "What is in this picture?": [],
    }
    assert {text: tags_of_question(text) for text in asked} == asked


# Files


@pytest.fixture
def records(tmp_path):
    for name in "abc":
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "<image>\nWhere is the cup?"}, {"from": "gpt", "value": "There."}]
    rows = [
        {"id": 1, "image": "a.png", "conversations": turns},
        {"id": 2, "conversations": turns},
        {"id": 3, "image": "b.png", "tags": "Dog | tree", "conversations": turns},
        {"question_id": 4, "image": "c.png", "text": "Is there a lamp?"},
        {"id": 1, "image": "a.png", "conversations": turns},
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Finder:
    def __init__(self, break_at=None):
        self.calls, self.break_at = [], break_at

    def __call__(self, image, tags):
        if len(self.calls) == self.break_at:
            raise KeyboardInterrupt
        self.calls.append(tags)
        return [Region(0.0, 0.0, float(image.width), 5.0, tag, 0.5) for tag in tags]


def test_boxes_of_records_are_written_and_an_interrupted_run_goes_on(records, tmp_path):
    out, settings = tmp_path / "out" / "boxes.jsonl", {"threshold": 0.2}
    with pytest.raises(KeyboardInterrupt):
        write_boxes(jobs_of(records), Finder(break_at=2), out, settings=settings)
    with out.open("a") as stream:
        stream.write('{"id": "4", "box')  # torn by the kill
    finder = Finder()
    done = write_boxes(jobs_of(records), finder, out, settings=settings)
    assert finder.calls == [("lamp",)]
    assert (done["found"], done["kept"], done["without"], len(done["bad"])) == (1, 2, 1, 0)
    boxes = BoxFile(out)
    assert list(boxes) == ["1", "3", "4"]
    assert boxes.part(3) == {
        "type": "boxes",
        "boxes": [[0, 0, 20, 5]] * 2,
        "labels": ["dog", "tree"],
        "scores": [0.5] * 2,
    }
    with pytest.raises(UserError, match="was made with other threshold"):
        write_boxes(jobs_of(records), finder, out, settings={"threshold": 0.3})
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        write_boxes(jobs_of(records), finder, tmp_path / "boxes.json", settings=settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 9, "image": "gone.png", "tags": "dog"}, r"records.jsonl:6: image: "),
        ({"image": "a.png", "tags": "dog"}, r"records.jsonl:6: id: is missing"),
        ({"id": 9, "image": "a.png"}, r"records.jsonl:6: tags: are missing"),
        ({"id": 9, "image": "a.png", "tags": [3]}, r"records.jsonl:6: tags: must be a list of strings"),
        ({"id": 9, "image": ["a.png", "b.png"], "tags": "dog"}, r"records.jsonl:6: image: must name one picture"),
        ({"id": 1, "image": "b.png", "tags": "dog"}, r"records.jsonl:6: id: '1' is also that of line 1"),
    ],
)
def test_broken_records_stop_or_are_skipped(records, tmp_path, row, message):
    with records.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    with pytest.raises(RecordError, match=message):
        write_boxes(jobs_of(records), Finder(), tmp_path / "stop.jsonl", settings={})
    done = write_boxes(jobs_of(records), Finder(), tmp_path / "skip.jsonl", settings={}, on_bad_record="skip")
    assert done["found"] == 3
    assert len(done["bad"]) == 1


def test_pictures_alone_need_tags(records, tmp_path):
    jobs = list(jobs_of(tmp_path, tags="dog, "))
    assert [(job.name, job.tags) for job in jobs] == [("a", ("dog",)), ("b", ("dog",)), ("c", ("dog",))]
    with pytest.raises(UserError, match="--tags"):
        list(jobs_of(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        list(jobs_of(tmp_path / "empty", tags="dog"))


def test_the_command(owl, records, tmp_path):
    from typer.testing import CliRunner

    from llavakit.cli.app import app

    out = tmp_path / "boxes.jsonl"
    told = ["boxes", str(records), "--detector", str(owl), "--out", str(out), "--threshold", "0"]
    for _ in range(2):
        result = CliRunner().invoke(app, told, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert list(BoxFile(out)) == ["1", "3", "4"]
