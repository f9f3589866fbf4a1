"""Weights of single tokens, from the label policy of a stage to the loss."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_server import small_chat

from llavakit.data.collate import Collator
from llavakit.data.dataset import SampleDataset
from llavakit.data.records import Record

LABELS = {"type": "spans", "weights": {"red": 5}}


@pytest.fixture(scope="module")
def chat():
    return small_chat()


def messages(answer, image=True):
    media = [{"type": "image", "image": Image.new("RGB", (32, 32), "red")}] if image else []
    return [
        {"role": "user", "content": [*media, {"type": "text", "text": "What colour, red?"}]},
        {"role": "assistant", "content": answer},
    ]


def test_visual_positions_and_other_tokens_weigh_one(chat):
    sample = chat.processor.encode(messages("A red disc"), labels=LABELS)
    assert len(sample["label_weights"]) == len(sample["input_ids"])
    heavy = [token for token, weight in zip(sample["input_ids"], sample["label_weights"], strict=True) if weight == 5]
    assert chat.processor.tokenizer.decode(heavy).split() == ["red", "red"]  # of the question too, which has no label
    assert "label_weights" not in chat.processor.encode(messages("A red disc"))


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_weighted_by_token(chat, packing):
    samples = [
        chat.processor.encode(messages("A red disc"), labels=LABELS),
        chat.processor.encode(messages("blue", image=False), labels=LABELS),
    ]
    del samples[1]["label_weights"]  # of a source without weights
    batch = Collator(0, max_length=128, packing=packing)(samples)
    inputs = {name: value for name, value in batch.items() if name != "label_weights"}
    net = chat.model
    with torch.no_grad():
        logits = net(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        weighted = float(net(**batch, skip_logits=True).loss)
        assert float(net(**batch).loss) == pytest.approx(weighted, rel=1e-5)
        plain = float(net(**inputs, skip_logits=True).loss)
    targets = batch["labels"][:, 1:].reshape(-1)
    each = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets, reduction="none", ignore_index=-100)
    factors = batch["label_weights"][:, 1:].reshape(-1)
    count = (targets != -100).sum()
    assert weighted == pytest.approx(float((each * factors).sum() / count), rel=1e-4)
    assert weighted != pytest.approx(plain, rel=1e-3)


def test_a_cut_sample_keeps_its_weights(chat):
    record = Record(messages("A red disc " * 20, image=False), "a.jsonl", 1, {})
    data = SampleDataset(
        [record], lambda found: chat.processor.encode(found, labels=LABELS), max_length=150, visual_token_id=-1
    )
    sample = data[0]
    assert len(sample["input_ids"]) == len(sample["labels"]) == len(sample["label_weights"]) == 150
