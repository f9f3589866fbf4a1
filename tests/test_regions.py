"""Several encoders of one media item in one connector, and regions from content part and record to visual tokens.

The parts are the smallest that use the seam: a planner that gives a low and a high view, of which the high one carries
the boxes, and a connector that reads both encoders and adds one token per box.
"""

from __future__ import annotations

import io
import json

import pytest
import tiny
import tiny_training
import torch
from PIL import Image
from tiny_server import data_url, small_chat, strict_server
from torch import nn

from llavakit.connectors.base import Connector, Features
from llavakit.data.collate import Collator
from llavakit.errors import RecordError, UserError
from llavakit.generation.chat import Chat
from llavakit.generation.engine import Engine
from llavakit.generation.request import Request, SamplingParams
from llavakit.media.regions import FRAMES, Region, to_corners
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.registry import CONNECTORS, PLANNERS
from llavakit.training.recipe import parse_recipe
from llavakit.training.run import train
from llavakit.views.image import Squash
from llavakit.views.plan import Plan, View
from llavakit.vision.roi_align import roi_align, roi_mean

LOW, HIGH = 16, 32


class LowAndHigh(Squash):
    """The image at two sizes, each for an encoder of its own; boxes are scaled to the high view."""

    takes_regions = True

    def plan(self, size, regions=()):
        scale_x, scale_y = HIGH / size.width, HIGH / size.height
        boxes = [(r.left * scale_x, r.top * scale_y, r.right * scale_x, r.bottom * scale_y) for r in regions]
        high = View(HIGH, HIGH, encoder=1, regions=tuple(boxes or [(0.0, 0.0, 0.0, 0.0)]))
        return Plan("image", size, (View(LOW, LOW), high))

    def select_regions(self, size, regions, text_length):
        best = sorted(regions, key=lambda region: -(region.score or 0))
        return best[: 1 if text_length > 60 else 3]

    def render(self, image, plan):
        return [image.resize((view.width, view.height), self.resample) for view in plan.views]


class Fused(Connector):
    """Low features plus the mean of the high ones, then one token per box."""

    encoders = 2

    def __init__(self, *, vision_width, hidden_size, region_width, text_config=None):
        super().__init__(vision_width=vision_width, hidden_size=hidden_size)
        self.low, self.high = (nn.Linear(width, hidden_size) for width in vision_width)
        self.region = nn.Linear(region_width[1], hidden_size)

    @classmethod
    def token_grids(cls, options, plan, grids):
        (low,) = (grid for view, grid in zip(plan.views, grids, strict=True) if view.encoder == 0)
        (high,) = (view for view in plan.views if view.encoder == 1)
        return [low, (1, 1, len(high.regions))]

    def forward(self, features, plans, prompt=None):
        low, high = features
        tokens, grids, media_index = [], [], []
        for number, (own, detail, boxes) in enumerate(zip(low.split(), high.split(), high.regions, strict=True)):
            tokens += [self.low(own) + self.high(detail).mean(0), self.region(boxes)]
            grids += [low.grids[number], (1, 1, len(boxes))]
            media_index += [number, number]
        return Features(torch.cat(tokens), grids, media_index)


PLANNERS.add("test_low_and_high", LowAndHigh)
CONNECTORS.add("test_fused", Fused)

PARTS = {
    "vision_config": {**tiny.ENCODERS["clip"], "image_size": LOW},
    "extra_encoders": {"detail": {"config": tiny.ENCODERS["convnext"], "layer": -1}},
    "connector": {"type": "test_fused", "encoder": ["vision_tower", "detail"]},
    "media": {"image": {"views": {"type": "test_low_and_high", "size": HIGH}}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_training.write_world(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def processor(world):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    return LlavakitProcessor.from_config(net_config(tokenizer.vocab_size), tokenizer)


def net_config(token: int = tiny.TOKEN) -> LlavakitConfig:
    text = {**tiny.DECODERS["llama"], "vocab_size": 96}
    return LlavakitConfig(text_config=text, image_token_id=token, **PARTS)


@pytest.fixture(scope="module")
def net(processor):
    torch.manual_seed(0)
    return LlavakitForConditionalGeneration(net_config(processor.image_token_id)).eval()


def picture(colour: str = "red") -> Image.Image:
    image = Image.new("RGB", (48, 40), colour)
    image.paste((0, 0, 255), (10, 10, 20, 20))
    return image


def messages(boxes=None, text="what colour ?", **more):
    parts = [{"type": "image", "image": picture()}]
    if boxes is not None:
        parts.append({"type": "boxes", "boxes": boxes, **more})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_processor_and_model_agree_on_the_tokens_of_boxes(processor, net):
    counts = []
    for boxes in (None, [[0, 0, 10, 10]], [[0, 0, 10, 10], [5, 5, 30, 20], [1, 1, 2, 2]]):
        sample = processor.encode(messages(boxes), add_generation_prompt=True)
        counts.append(sample["input_ids"].count(processor.image_token_id))
        batch = Collator(0)([sample])
        assert ("visual_regions" in batch) == (boxes is not None)
        batch.pop("labels")
        with torch.no_grad():
            assert net(**batch).logits.shape[1] == len(sample["input_ids"])
    assert counts == [4 + 1, 4 + 1, 4 + 3]


def test_selection_sees_scores_and_the_length_of_the_text(processor):
    boxes, scores = [[0, 0, 9, 9], [1, 1, 9, 9], [2, 2, 9, 9], [3, 3, 9, 9]], [0.1, 0.9, 0.5, 0.7]
    sample = processor.encode(messages(boxes, scores=scores), add_generation_prompt=True)
    assert sample["visual_regions"][0][:, 0].tolist() == [1.0, 3.0, 2.0]
    sample = processor.encode(messages(boxes, "what " * 80, scores=scores), add_generation_prompt=True)
    assert sample["visual_regions"][0][:, 0].tolist() == [1.0]


def test_a_box_changes_its_own_token_alone(net):
    views = [torch.randn(3, LOW, LOW), torch.randn(3, HIGH, HIGH)]
    sizes = torch.tensor([[1, HIGH, HIGH]])

    def tokens(boxes):
        regions = [torch.tensor(boxes, dtype=torch.float64)]
        with torch.no_grad():
            return net.model.get_image_features(views, sizes, visual_regions=regions).pooler_output[0]

    one, other = tokens([[0, 0, 8, 8], [16, 16, 32, 32]]), tokens([[0, 0, 8, 8], [0, 16, 16, 32]])
    changed = (one - other).abs().amax(1) > 1e-6
    assert changed.tolist() == [False] * 5 + [True]


def test_the_engine_keeps_requests_with_different_boxes_apart(processor, net):
    def request(boxes):
        sample = processor.encode(messages(boxes), add_generation_prompt=True)
        return Request(
            input_ids=sample["input_ids"],
            pixel_values=sample["pixel_values"],
            visual_sizes=torch.tensor(sample["visual_sizes"]),
            visual_regions=sample["visual_regions"] or None,
            sampling=SamplingParams(max_new_tokens=6, eos_token_ids=(), logprobs=0),
        )

    sets = (None, [[0, 0, 30, 30]], [[20, 0, 48, 40]], [[0, 0, 30, 30], [20, 0, 48, 40]])
    engine = Engine(net)
    together = engine.generate([request(boxes) for boxes in sets])
    alone = [Engine(net).generate([request(boxes)])[0] for boxes in sets]
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close([x.logprob for x in one.logprobs], [x.logprob for x in other.logprobs])
    assert len({tuple(x.logprob for x in reply.logprobs) for reply in together}) == len(sets)


def test_records_with_boxes_train_the_same_with_cached_features(world, tmp_path):
    records = json.loads((world / "records.json").read_text())
    for number, record in enumerate(records):
        if "image" in record and number % 2:
            record["boxes"] = {"boxes": [[2, 2, 9, 9 + number % 5], [0, 0, 20, 20]], "scores": [0.5, 0.9]}
    (tmp_path / "records.json").write_text(json.dumps(records))
    losses = []
    for cached in (False, True):
        recipe = tiny_training.recipe(world, output=str(tmp_path / f"run{cached}"))
        recipe["parts"] |= PARTS
        recipe["data"][0]["path"] = str(tmp_path / "records.json")
        stage = recipe["stages"][1] | {"max_steps": 2, "train": ["multi_modal_projector"], "packing": True}
        stage |= {"max_length": 128, "cache_features": cached}
        recipe["stages"] = [stage]
        losses.append([entry["loss"] for entry in train(parse_recipe(recipe)).stages[-1].metrics["log"]])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)  # features are kept in float16


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"boxes": [[0, 0, 1, 1]]}, "boxes"),
        ({"boxes": {"boxes": [[5, 0, 1, 1]]}}, r"boxes\.boxes\.0: is inverted"),
        ({"boxes": {"boxes": [[0, 0, 1]]}}, r"boxes\.boxes\.0"),
        ({"boxes": {"boxes": [[0, 0, 1, float("nan")]]}}, r"boxes\.boxes\.0"),
        ({"boxes": {"boxes": [[0, 0, 1, 1]], "scores": [0.1, 0.2]}}, r"boxes\.scores"),
        ({"boxes": {"boxes": [[0, 0, 1, 1]], "labels": [3]}}, r"boxes\.labels\.0"),
        ({"boxes": [{"boxes": []}, {"boxes": []}]}, "2 entries, but the record has 1 images"),
    ],
)
def test_broken_boxes_of_a_record_are_named(record, field):
    from llavakit.data.records import read_record

    turns = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    with pytest.raises(RecordError, match=field):
        read_record({"image": "a.png", "conversations": turns, **record}, "f.json", 3, check_files=False)


def test_boxes_for_a_model_that_takes_none_are_refused():
    chat = small_chat()
    with pytest.raises(UserError, match="takes no boxes"):
        chat.processor.encode(messages([[0, 0, 1, 1]]), add_generation_prompt=True)


def test_boxes_through_the_server(processor, net):
    openai = pytest.importorskip("openai")
    chat = Chat(net, processor, name="tiny", max_batch=4)
    server = strict_server(chat)

    def ask(**boxes):
        buffer = io.BytesIO()
        picture().save(buffer, "PNG")
        image = {"type": "image_url", "image_url": {"url": data_url(buffer.getvalue())}}
        content = [image, {"type": "boxes", **boxes}, {"type": "text", "text": "what colour ?"}]
        chosen = {"model": "tiny", "max_tokens": 6, "logprobs": True}
        reply = server.client().chat.completions.create(messages=[{"role": "user", "content": content}], **chosen)
        return [entry.logprob for entry in reply.choices[0].logprobs.content]

    try:
        boxes = [[0, 0, 30, 30], [20, 0, 48, 40]]
        sample = processor.encode(messages(boxes, scores=[0.2, 0.9]), add_generation_prompt=True)
        media = {name: sample[name] for name in ("pixel_values", "visual_regions")}
        request = Request(
            sample["input_ids"],
            **media,
            visual_sizes=torch.tensor(sample["visual_sizes"]),
            sampling=SamplingParams(max_new_tokens=6, logprobs=0),
        )
        wanted = [entry.logprob for entry in Engine(net).generate([request])[0].logprobs]
        assert ask(boxes=boxes, scores=[0.2, 0.9]) == pytest.approx(wanted[:6], abs=1e-5)
        with pytest.raises(openai.BadRequestError, match="one entry per box") as refused:
            ask(boxes=boxes, scores=[0.2])
        assert refused.value.param == "messages.0.content.1.scores"
        with pytest.raises(openai.BadRequestError, match="is inverted"):
            ask(boxes=[[9, 9, 1, 1]])
    finally:
        server.stop()


def test_every_frame_of_a_box_becomes_the_same_corners():
    wanted = (240.0, 120.0, 400.0, 360.0)
    given = {
        "pixel_corners": wanted,
        "pixel_center": (320, 240, 160, 240),
        "fraction_corners": (0.375, 0.25, 0.625, 0.75),
        "fraction_center": (0.5, 0.5, 0.25, 0.5),
    }
    assert set(given) == set(FRAMES)
    for frame, box in given.items():
        assert to_corners(box, frame, (640, 480)) == pytest.approx(wanted)
    assert Region(*wanted).box == wanted


def test_roi_align_reads_plain_means_where_they_are_known():
    ramp = torch.arange(12.0).repeat(2, 12, 1)  # value = column
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 2.0, 10.0, 6.0], [-5.0, -5.0, -3.0, -3.0], [3.0, 3.0, 3.0, 3.0]])
    aligned = roi_align(ramp, boxes, 2, 1.0)
    assert aligned.shape == (4, 2, 2, 2)
    torch.testing.assert_close(aligned[0, 0], torch.tensor([[2.0, 6.0], [2.0, 6.0]]))
    torch.testing.assert_close(aligned[1, 0], torch.tensor([[5.5, 8.5], [5.5, 8.5]]))
    assert aligned[2].abs().max() == 0
    torch.testing.assert_close(roi_mean(ramp, boxes, 4, 1.0), roi_align(ramp, boxes, 4, 1.0).mean((2, 3)))
    torch.testing.assert_close(roi_mean(ramp, boxes[3:], 1, 1.0)[0, 0], torch.tensor(3.5))  # at least one cell
