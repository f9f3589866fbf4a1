"""Video-LLaVA's golden components of text and arithmetic: prompts, labels, sizes, frame numbers, batch order."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llavakit.checkpoints.classic import IMAGE_MARKS
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.conversation.messages import from_llava, limit_images, split_literals
from llavakit.conversation.template import get_template
from llavakit.conversation.turns import TextDelta
from llavakit.data.sampler import modality_grouped
from llavakit.evaluation.judges import Judge
from llavakit.evaluation.score import score
from llavakit.generation.responder import Call, Responder
from llavakit.media.frame_sampling import choose
from llavakit.model.processing import LlavakitProcessor
from llavakit.proof.entries import (
    byte_tokenizer,
    one_token_media,
    original_ids,
    text_processor,
    toy_tokenizer,
    training_sample,
    with_blank_media,
)
from llavakit.proof.golden import Case, Example, examples, take
from llavakit.registry import PLANNERS
from llavakit.splice.scatter import IGNORE
from llavakit.systems.video_llava.checkpoint import VIDEO_MARKS, image_views, video_views
from llavakit.views.plan import MediaSize

SIZE = 224
TRAINED = {"v1": "video_llava_training", "vicuna_v1": "video_llava_training", "llava_v1": "video_llava"}


def processor_of(tokenizer: Any, template: str, marks: bool = False) -> LlavakitProcessor:
    """A processor under which every image and every frame is one token, perhaps with marks around media."""
    config = one_token_media()
    for modality, (before, after) in {"image": IMAGE_MARKS, "video": VIDEO_MARKS}.items() if marks else ():
        ids = [tokenizer(mark, add_special_tokens=False).input_ids for mark in (before, after)]
        arrange = {"type": "wrapped", "before": ids[0], "after": ids[1]}
        config.media = config.media | {modality: config.media[modality] | {"arrange": arrange}}
    return text_processor(tokenizer, TRAINED.get(template, template), config)


def expanded(sentence: str, frames: int, marks: bool, template: str) -> str:
    """A sentence with a placeholder for every image and every frame, read back from the ids of a prompt."""
    parts = split_literals(sentence)
    if all(part["type"] == "text" for part in parts):
        return sentence
    processor = processor_of(byte_tokenizer(), "plain", marks)
    messages = [{"role": "user", "content": parts}]
    most = get_template(TRAINED.get(template, template)).most_images
    if most is not None:
        messages, _ = limit_images(messages, most)
    messages = with_blank_media(messages, frames)
    ids = processor.encode(messages, pixels=False, add_generation_prompt=True, placement="keep")["input_ids"]
    return processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False).removesuffix("\n")


def training_prompt(case: Case) -> Iterator[Example]:
    """Expanded sentences, prompt, ids and labels of training samples."""
    case.informational("config.template", "config.tokenizer")
    token, ignore = case.config.get("image_token_index", IMAGE_PLACEHOLDER), case.config.get("ignore_index", IGNORE)
    length = case.config.get("model_max_length")
    tokenizer = toy_tokenizer()

    def sample(given: Mapping[str, Any]) -> dict[str, Any]:
        turns = take(given["conversations"])
        has_image, frames, marks = (
            given.get("has_image", True),
            given.get("num_frames", 8),
            given.get("startend", False),
        )
        counts = {
            kind: sum(turn["value"].count(f"<{kind}>") for turn in turns) * has_image for kind in ("image", "video")
        }
        record = {kind: ["-"] * count for kind, count in counts.items() if count}
        messages = from_llava({"conversations": turns, **record})
        options = {"frames": frames, "placement": "keep", "labels": "rounds", "max_length": length}
        found = training_sample(processor_of(tokenizer, given["template"], marks), messages, **options)
        spoken = processor_of(byte_tokenizer(), given["template"], marks)
        ids = spoken.encode(with_blank_media(messages, frames), pixels=False, placement="keep")["input_ids"]
        return {
            "expanded": [
                expanded(turn["value"], frames, marks, given["template"]) if has_image else turn["value"]
                for turn in turns
            ],
            "prompt": spoken.tokenizer.decode(ids, clean_up_tokenization_spaces=False),
            "input_ids": [token if i == IMAGE_PLACEHOLDER else i for i in found["input_ids"]],
            "labels": [ignore if label == IGNORE else label for label in found["labels"]],
            "warning": found["fully_masked"],
        }

    yield from examples(sample, case.inputs)


def question_parts(kind: str, question: str, frames: int) -> str:
    """What the original's scripts put in front of a question."""
    if kind == "readme_video":
        return " ".join(["<image>"] * frames) + "\n" + question
    return {"video": "<video>\n", "image": "<image>\n", "text": ""}[kind] + question


def inference_prompt(case: Case) -> Iterator[Example]:
    """Prompts and their ids."""
    case.informational("config.tokenizer")
    tokenizer = toy_tokenizer()

    def prompt(given: Mapping[str, Any]) -> dict[str, Any]:
        text = question_parts(given["kind"], given["question"], given["num_frames"])
        messages = with_blank_media([{"role": "user", "content": split_literals(text)}], given["num_frames"])
        found = {}
        for name, own in (("prompt", byte_tokenizer()), ("input_ids", tokenizer)):
            processor = processor_of(own, given["template"])
            ids = processor.encode(messages, pixels=False, add_generation_prompt=True, placement="keep")["input_ids"]
            if name == "prompt":
                found[name] = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            else:
                found[name] = original_ids(processor, ids)
        return found

    yield from examples(prompt, case.inputs)


def resize_arithmetic(case: Case) -> Iterator[Example]:
    """Sizes before the crop, its place, and the numbers of sampled frames."""

    def sizes(views: Mapping[str, Any], size: Sequence[int]) -> dict[str, int]:
        width, height = size
        planner = PLANNERS.build(views)
        tall, wide = planner.plan(MediaSize(1, height, width)).canvas
        top, left = planner.crop(tall, wide)
        return {"new_height": tall, "new_width": wide, "crop_top": top, "crop_left": left}

    def frames(pair: Sequence[int]) -> dict[str, Any]:
        total, wanted = pair
        sampling = {"type": "uniform", "frames": wanted}
        indices = choose(sampling, total=total, average_rate=1.0, timestamps=range(total))
        return {"total_frames": total, "num_frames": wanted, "indices": indices}

    for name, views in (("video", video_views(SIZE, None)["frame"]), ("image", image_views(SIZE, False))):
        yield from examples(lambda size, views=views: sizes(views, size), case.inputs["sizes_width_height"], name)
    yield from examples(frames, case.inputs["frames"], "frame_sampling")


def sampler(case: Case) -> dict[str, Any]:
    """The order of samples, of one modality in a batch of all processes."""
    config = case.config
    generators = [torch.Generator().manual_seed(config["seed"]) for _ in range(2)]
    indices = modality_grouped(
        case.inputs["lengths"], config["batch_size"], config["world_size"], generators[0], order_generator=generators[1]
    )
    return {"indices": indices}


class Canned(Responder):
    """A judge whose reply is given; remembers what it is told."""

    def __init__(self, reply: str) -> None:
        super().__init__(name="canned")
        self.reply, self.told = reply, []

    def run(self, call: Call) -> Iterator[TextDelta]:
        self.told.append([dict(message) for message in call.messages])
        yield TextDelta(text=self.reply)


def video_qa_judge(case: Case) -> Iterator[Example]:
    """What a judge is told, what its replies say, and the figures over those that say something."""
    case.informational("config.judge_model")  # asked through an API there; here its replies are given

    def judged(item: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[Any]]:
        item, judge = take(item), Canned(item["judge_reply"])
        with tempfile.TemporaryDirectory() as folder:
            file, said = Path(folder) / "answers.jsonl", Path(folder) / "judgements.json"
            answer = {"id": 1, **{name: item[name] for name in ("question", "answer", "pred")}}
            file.write_text(json.dumps(answer), encoding="utf-8")
            score("video_chatgpt_qa", file, judge=Judge(judge), judgements=said, attempts=1)
            return judge.told[0], [one for one, _ in json.loads(said.read_text(encoding="utf-8")).values()]

    found = [judged(item) for item in case.inputs]

    def aggregate() -> dict[str, Any]:
        entries = {number: [said[0], {}] for number, (_, said) in enumerate(found) if said}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "judgements.json"
            file.write_text(json.dumps(entries), encoding="utf-8")
            metrics = score("video_chatgpt_qa", file)["metrics"]
        accuracy = None if metrics["accuracy"] is None else metrics["accuracy"] / 100
        names = {"yes_count": "yes", "no_count": "no", "average_score": "score"}
        return {name: metrics[own] for name, own in names.items()} | {"accuracy": accuracy}

    yield Example("messages", lambda: [told for told, _ in found], "messages")
    yield Example("parsed", lambda: [said[0] if said else None for _, said in found], "parsed")
    yield Example("aggregate", aggregate, "aggregate_over_parsed")


ADAPTERS = {
    "training_prompt": training_prompt,
    "inference_prompt": inference_prompt,
    "resize_arithmetic": resize_arithmetic,
    "sampler": sampler,
    "video_qa_judge": video_qa_judge,
}
