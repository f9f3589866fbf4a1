"""ReflectiVA's golden components: training lists, labels, prompts, the procedure, losses and the network."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llavakit.conversation.encode import IMAGE_PLACEHOLDER, escape_special_tokens
from llavakit.conversation.messages import from_llava, normalise
from llavakit.conversation.turns import Event, TextDelta
from llavakit.data.preparation import prepare
from llavakit.data.records import Record
from llavakit.errors import UserError
from llavakit.generation.request import SamplingParams
from llavakit.generation.responder import Call, Responder
from llavakit.generation.response import RawDelta
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import (
    array,
    byte_tokenizer,
    check_keys,
    greedy,
    original_ids,
    prompt_ids,
    published_model,
    text_processor,
    training_sample,
)
from llavakit.proof.golden import Case, Example, Result, component, examples, take
from llavakit.splice.scatter import IGNORE
from llavakit.systems.reflectiva import parity_eval
from llavakit.systems.reflectiva.knowledge import SEARCHED, Knowledge, unit_rows
from llavakit.systems.reflectiva.objective import Choices, losses, predicted
from llavakit.systems.reflectiva.prompts import answer, judgement
from llavakit.systems.reflectiva.responder import Reflection
from llavakit.systems.reflectiva.tokens import FITS, NEEDS
from llavakit.training.dataset import WORDS_PER_IMAGE, Samples
from llavakit.training.objectives.base import Step, objective_of
from llavakit.training.recipe import Stage
from llavakit.views.plan import MediaSize

ENDS_OF_REPLIES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
PICTURE = Image.new("RGB", (2, 2))
# The two chat templates of the cases: that of the published tokenizer, and one that leaves the end closed.
PUBLISHED = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
OPEN_END = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
ENDS = {
    PUBLISHED + OPEN_END: True,
    PUBLISHED + "{% if add_generation_prompt %}" + OPEN_END + "{% endif %}": False,
    PUBLISHED: False,
}


def tokenizer_of(case: Case, **special: str) -> Any:
    """The case's tokenizer."""
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(case.sibling("tokenizer.json")), **names | special)


def ends_open(template: str) -> bool:
    """Whether a chat template of a case always ends with an open header."""
    if template not in ENDS:
        raise UserError("chat_template: llavakit has no template that writes the same")
    return ENDS[template]


# Data and labels


def training_list(case: Case) -> Iterator[Example]:
    """The three files as one list, from `llavakit prepare`."""
    config = take(case.config)
    options = {
        "template_paragraph": config.pop("template_paragraph", "template_1"),
        "resampler": config.pop("resampler", "vanilla"),
        "repeats": config.pop("llava_instruct_multiplier", 3),
        "seed": config.pop("seed_of_python_random", 42),
    }
    check_keys(config, (), "config")
    inputs = take(case.inputs)

    def made() -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as place:
            folder, output = Path(place) / "data", Path(place) / "train.json"
            folder.mkdir()
            for name, records in inputs.items():
                (folder / f"train_multiturn_{name}.json").write_text(json.dumps(records), encoding="utf-8")
            prepare("reflective_list", folder, output, **options)
            return json.loads(output.read_text(encoding="utf-8"))

    def order() -> list[dict[str, Any]]:
        return [
            {
                "id": record.get("id"),
                "ret_token": record["asks_for_passage"],
                "image": record.get("image"),
                "values": [turn["value"] for turn in record["conversations"]],
            }
            for record in made()
        ]

    def words(per_image: int) -> list[int]:
        rows = made()
        samples = Samples(
            [Record([], "case", number, raw) for number, raw in enumerate(rows)],
            text_processor(byte_tokenizer(), "reflectiva"),
        )
        return [samples.words(number, per_image) for number in range(len(rows))]

    yield Example("order", order, "order")
    yield Example("modality_lengths", partial(words, 0), "modality_lengths")
    yield Example("lengths", lambda: list(map(abs, words(WORDS_PER_IMAGE))), "lengths")


def labels(case: Case) -> Iterator[Example | Result]:
    """Ids and labels of dialogues; a template that leaves the end closed masks everything, as in the original."""
    case.informational("config.image_token_index")
    ignore, limit = case.config.get("ignore_index", IGNORE), case.config.get("model_max_length")
    tokenizer = tokenizer_of(case)
    from llavakit.systems.reflectiva.templates import REFLECTIVA, closed

    def sampled(item: Mapping[str, Any], template: Any) -> dict[str, Any]:
        policy = {
            "type": "reflective",
            "template_paragraph": item.get("template_paragraph", "template_1"),
            "mask_paragraph": item.get("mask_paragraph", True),
            "counted": True,
        }
        turns = item["conversation"]
        images = sum(turn["value"].count("<image>") for turn in turns) if item.get("has_image", True) else 0
        messages = from_llava({"conversations": turns} | ({"image": ["-"] * images} if images else {}))
        # the original cuts texts alone, and before it drops the second of two begin tokens
        cut = {} if images or limit is None else {"max_length": limit - 1}
        return training_sample(text_processor(tokenizer, template), messages, labels=policy, **cut)

    def labelled(item: Mapping[str, Any]) -> dict[str, Any]:
        item = take(item)
        right = sampled(item, REFLECTIVA)
        found = right if ends_open(item["chat_template"]) else sampled(item, closed())
        warning = None
        if found["fully_masked"]:
            lengths = f"{len(right['input_ids'])} vs. {len(found['input_ids'])}"
            warning = f"WARNING: tokenization mismatch: {lengths}. (ignored)"
        return {
            "name": item["name"],
            "input_ids": found["input_ids"],
            "labels": [ignore if label == IGNORE else label for label in found["labels"]],
            "warning": warning,
            "error": None,
        }

    ignored = {}
    for number, item in enumerate(case.inputs):
        if not isinstance(case.wanted.json[number].get("input_ids"), list) or item.get("mask_answer", False):
            take(item)
            ignored[f"{number}*"] = "the original raises an error here; llavakit learns from such dialogues"
            continue
        yield Example(item.get("name", str(number)), partial(labelled, item), str(number))
    if ignored:
        yield Result(json={}, ignored=ignored)


# Prompts and procedure


def question(text: str, image: Any = PICTURE) -> list[dict[str, Any]]:
    """The conversation that asks a question about a picture."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def check_mode(case: Case) -> None:
    """Refuse other formats of conversations than that of Llama 3.1."""
    mode = case.config.get("conv_mode", "llama_3_1")
    if mode != "llama_3_1":
        raise UserError(f"conv_mode: is {mode!r}; ReflectiVA was published with llama_3_1")


def prompts(case: Case) -> Iterator[Example]:
    """Texts and ids of the three prompts."""
    case.informational("config.image_token_index")
    check_mode(case)
    if not ends_open(case.config["chat_template"]):
        raise UserError("chat_template: leaves prompts closed")
    processor = text_processor(tokenizer_of(case), "reflectiva")
    plain = text_processor(byte_tokenizer(), "reflectiva")

    def step(name: str, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        messages = normalise(messages)
        ids = plain.encode(messages, pixels=False, add_generation_prompt=True)["input_ids"]
        text = plain.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return {f"{name}_text": text, f"{name}_ids": prompt_ids(processor, messages, add_generation_prompt=True)}

    def steps(item: Mapping[str, Any]) -> dict[str, Any]:
        item = take(item)
        asked = question(item["question"])
        chosen = [item["sections"][number] for number in item["relevant"]]
        last = step("step3", answer(asked, chosen, short=item.get("short_prompt", True)))
        found = step("step1", asked) | step("step2", judgement(asked, chosen[0])) | last
        # of the last prompt the cases hold the text around the picture, and where the picture stands
        text = last["step3_text"].replace("<image>", "", 1)
        return found | {"step3_text": text, "step3_image_at": last["step3_ids"].index(IMAGE_PLACEHOLDER)}

    yield from examples(steps, case.inputs)


class Scripted(Responder):
    """A model that says what a case scripts, in the order of its calls, and notes every prompt."""

    def __init__(self, processor: LlavakitProcessor, script: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(name="script", capacity=1)
        self.processor, self.script, self.calls = processor, iter(script), []

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def escape(self, messages: Sequence[Mapping[str, Any]]) -> list[Any]:
        return escape_special_tokens(messages, self.tokenizer)

    def run(self, call: Call) -> Iterator[Event]:
        ids = self.processor.encode(call.messages, pixels=False, add_generation_prompt=True)["input_ids"]
        reply = next(self.script)
        self.calls.append(
            {
                "prompt_ids": original_ids(self.processor, ids),
                "generated_text": reply["generated_text"],
                "generated_ids": reply["generated_ids"],
                "do_sample": call.sampling.temperature > 0,
                "max_new_tokens": call.sampling.max_new_tokens,
            }
        )
        text = self.tokenizer.decode(reply["generated_ids"], skip_special_tokens=call.sampling.skip_special_tokens)
        yield RawDelta(text=text, token_ids=tuple(reply["generated_ids"]))
        yield TextDelta(text=text.strip())


def stored(folder: Path, vectors: np.ndarray, pages: Sequence[tuple[str, Sequence[str]]]) -> Any:
    """A store of pages with their vectors.

    Args:
        pages: Name and passages of every page.
    """
    from llavakit.retrieval.entries import Entry
    from llavakit.retrieval.store import Store

    store = Store.create(folder, vectors.shape[1], metric="dot")
    store.add([Entry(page, tuple(passages)) for page, passages in pages], vectors)
    return store


def scripted_encoder(dimension: int) -> Any:
    """An encoder of pictures that gives the features [dimension] that it holds as `now`, whatever the picture shows."""
    from llavakit.retrieval.encoder import StoreEncoder

    class Features(StoreEncoder):
        name, identity, now = "case", "case", torch.zeros(dimension)

        def __init__(self) -> None:
            self.dimension = dimension

        def texts(self, texts: Sequence[str]) -> np.ndarray:
            raise UserError("a case has no features of texts")

        def images(self, images: Sequence[Image.Image]) -> np.ndarray:
            return unit_rows(self.now.repeat(len(images), 1))

    return Features()


@component(echoes=("generate_calls.*.generated_text", "generate_calls.*.generated_ids.*"), ordered=True)
def procedure(case: Case) -> dict[str, Any]:
    """The whole procedure on a scripted model: what is asked in which order, and what is answered."""
    check_mode(case)
    inputs, tensors = take(case.inputs), dict(case.tensors)
    processor = text_processor(tokenizer_of(case), "reflectiva")
    for name, token in (("ret_token", NEEDS[1]), ("rel_token", FITS[1])):
        if case.config.get(name, processor.tokenizer.convert_tokens_to_ids(token)) != (
            processor.tokenizer.convert_tokens_to_ids(token)
        ):
            raise UserError(f"{name}: is not the id of {token}")
    shortest = case.config.get("min_section_chars", 5)
    known = ("samples", "knn_urls", "knowledge_base", "entity_k", "short_prompt", "fix_ret_token", "temperature")
    check_keys(inputs, (*known, "seed_of_python_random"), "inputs")
    script = case.wanted.json["generate_calls"]

    def run() -> dict[str, Any]:
        from llavakit.retrieval.retriever import StoreRetriever

        pages = [(url, inputs["knowledge_base"][url]["section_texts"]) for url in inputs["knn_urls"]]
        model = Scripted(processor, script)
        draws = random.Random(inputs["seed_of_python_random"])
        answers = []
        with tempfile.TemporaryDirectory() as place:
            store = stored(Path(place) / "store", array(tensors["index"]), pages)
            encoder = scripted_encoder(store.dimension)
            responder = Reflection(
                model,
                store=StoreRetriever(store, encoder),
                shortest=shortest,
                draw=lambda count: draws.randint(0, count - 1),
                retrieve="always" if inputs.get("fix_ret_token", False) else "auto",
                pages=inputs["entity_k"],
                short=inputs.get("short_prompt", True),
                decisions="sampled",
            )
            sampling = SamplingParams(max_new_tokens=128, temperature=inputs.get("temperature", 0))
            for sample, encoder.now in zip(inputs["samples"], tensors["queries"], strict=True):
                picture = Image.new("RGB", (2, 2), (sample["gray"],) * 3)
                (found,) = responder.answer_all([question(sample["question"], picture)], sampling)
                if isinstance(found, Exception):
                    raise found
                answers.append(
                    {
                        "question": sample["question"],
                        "reference": sample["answer"].split("|"),
                        "answers": found.content,
                        "question_type": sample["question_type"],
                    }
                )
        return {"answers": answers, "generate_calls": model.calls}

    return run()


def retrieve_pages(case: Case) -> Iterator[Example]:
    """The pages of a query, best first."""
    case.informational("config.index", "config.n", "config.dim")
    searched = case.config.get("searched", SEARCHED)
    names, index = [value[0] for value in take(case.inputs)["values"]], case.tensors["index"]
    query = case.tensors["query"]

    def found(count: int) -> list[str]:
        from llavakit.retrieval.retriever import StoreRetriever

        with tempfile.TemporaryDirectory() as place:
            store = stored(Path(place) / "store", array(index), [(name, ()) for name in names])
            return [hit.entry.page for hit in Knowledge(StoreRetriever(store), searched=searched).pages(query, count)]

    for key in case.wanted.json:
        yield Example(key, partial(found, int(key)), key)


# Loss and accuracy


def number(value: Tensor | float | None) -> float | None:
    """A number as JSON has it."""
    value = None if value is None else float(value)
    return None if value is None or math.isnan(value) else value


def loss(case: Case) -> dict[str, Any]:
    """The loss, and with a weight of its own for retrieval tokens."""
    case.informational("config.vocab_size")
    config = case.config
    logits, targets, _ = predicted(case.tensors["logits"], case.tensors["labels"])
    found = losses(logits, targets, [config["no_retrieval_id"], config["retrieval_id"]])
    return {
        "standard_loss": number(found.all),
        "weighted_loss": number(found.weighted(config.get("weight_loss_special", 5))),
        "loss_special_xe": number(found.retrieval),
        "loss_answer_xe": number(found.rest),
    }


def token_accuracy(case: Case) -> dict[str, Any]:
    """How often the likeliest token is the right one of a pair, by data set and token."""
    pair = case.config["special_tokens"]
    names = take(case.inputs)["dataset_names"]
    logits, targets, rows = predicted(case.tensors["logits"], case.tensors["labels"])
    choices = Choices(pair)
    choices.add(logits, targets, [names[row] for row in rows.tolist()])
    found = {"accuracy_global": choices.accuracy(), "accuracy_top2": choices.decided}
    found |= {f"accuracy_{name}": choices.accuracy(group=name) for name in names}
    found |= {"accuracy_relevant": choices.accuracy(token=pair[0])}
    found |= {"accuracy_no_relevant": choices.accuracy(token=pair[1])}
    return {name: found.get(name) for name in case.wanted.json}


# The network


def model_of(case: Case) -> LlavakitForConditionalGeneration:
    """The case's model, opened as a published checkpoint."""
    config = take(case.config)
    for name in ("special_ids", "weight_loss_special"):
        config.pop(name, None)
    vision = {"model_type": "clip_vision_model", **config.pop("vision")}
    raw = {"model_type": "llava_llama", "image_aspect_ratio": "pad", "template_paragraph": "template_1", **config}
    return published_model(raw, case.weights(), vision)


def end_to_end(case: Case) -> Iterator[Example]:
    """Splice, logits, both losses and the greedy reply of a tiny model."""
    case.informational("config.special_ids", "config.special_ids.*", "inputs.conversations", "inputs.conversations.*")
    if not ends_open(case.inputs["chat_template"]):
        raise UserError("chat_template: leaves prompts closed")
    tensors, wanted = case.tensors, case.wanted
    model, tokenizer = model_of(case), tokenizer_of(case)
    entries = [Entry("image", MediaSize(1, *view.shape[-2:]), [view]) for view in tensors["images"]]
    batch = ClassicBatch(
        model,
        tensors["input_ids"],
        {IMAGE_PLACEHOLDER: entries},
        attention_mask=tensors["attention_mask"],
        labels=tensors["labels"],
        padding_side=case.config.get("tokenizer_padding_side", "right"),
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = LlavakitProcessor.from_config(model.config, tokenizer)

    def learned(weight: float | None) -> Any:
        objective = {"type": "reflective", "weight": weight}
        stage = Stage(name="tune", train=["language_model"], learning_rate=0.0, objective=objective)
        chosen = objective_of(stage)
        chosen.bind(model.config, processor)
        inputs = batch.collated()
        with torch.no_grad():
            return chosen.loss(model, inputs, Step(chosen.items(inputs), 1))

    def outputs() -> Result:
        targets = batch.targets
        places = (targets[:, 1:] != IGNORE).nonzero()
        with torch.no_grad():
            logits = batch.forward().logits
            features = torch.stack(model.get_image_features(tensors["images"]).pooler_output)
        return Result(
            json={"logit_positions": places.tolist()},
            tensors={
                "spliced_attention_mask": batch.attention,
                "spliced_labels": targets,
                "image_features": features,
                "picked_logits": logits[tuple(places.T)],
            },
        )

    def number_of(name: str, weight: float | None) -> float | None:
        found = learned(weight)
        return number(found.value if name.endswith(("standard_loss", "weighted_loss")) else found.logged.get(name))

    yield Example("logit_positions", lambda: outputs().json["logit_positions"], "logit_positions")
    yield Example("network", lambda: Result(tensors=outputs().tensors), tensors=("*",))
    yield Example("standard_loss", partial(number_of, "standard_loss", None), "standard_loss")
    weight = case.config.get("weight_loss_special", 5)
    yield Example("weighted_loss", partial(number_of, "weighted_loss", weight), "weighted_loss")
    yield Example("loss_special_xe", partial(number_of, "retrieval_loss", None), "loss_special_xe")
    yield Example("loss_answer_xe", partial(number_of, "answer_loss", None), "loss_answer_xe")

    def prompt() -> list[int]:
        asked = [{"role": "system", "content": ""}, *question("q?")]
        return prompt_ids(text_processor(tokenizer, "reflectiva"), normalise(asked), add_generation_prompt=True)

    def reply() -> list[int]:
        (sample,) = ClassicBatch(model, [prompt()], {IMAGE_PLACEHOLDER: entries}).samples
        ends = [tokenizer.convert_tokens_to_ids(name) for name in ENDS_OF_REPLIES]
        return greedy(model, [sample], len(wanted.json["greedy_ids"]), ends)[0]

    yield Example("prompt_ids", prompt, "prompt_ids")
    yield Example("greedy_ids", reply, "greedy_ids")


ADAPTERS = {
    "training_list": training_list,
    "labels": labels,
    "prompts": prompts,
    "procedure": procedure,
    "retrieve_pages": retrieve_pages,
    "split_passages": parity_eval.split_passages,
    "infoseek_scores": parity_eval.infoseek_scores,
    "encyclopedic_vqa_scores": parity_eval.encyclopedic_vqa_scores,
    "loss": loss,
    "token_accuracy": token_accuracy,
    "end_to_end": end_to_end,
}
