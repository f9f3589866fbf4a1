"""Golden components of LLaVA-1.5 that concern text and data: templates, ids, labels, samplers, optimiser groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llavakit.conversation.encode import IMAGE_PLACEHOLDER, tokenize
from llavakit.conversation.messages import Message, from_llava, media_first, to_llava
from llavakit.conversation.stop import KeywordStop
from llavakit.data import scienceqa
from llavakit.data.collate import Collator
from llavakit.data.records import Record
from llavakit.data.sampler import even_chunks, length_grouped, modality_grouped
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.entries import (
    byte_tokenizer,
    one_token_media,
    prompt_text,
    text_processor,
    training_sample,
    turns_to_messages,
)
from llavakit.proof.golden import Case, Example, Result, component, examples, take
from llavakit.splice.scatter import IGNORE
from llavakit.systems.llava_1_5.names import inferred_template, model_name
from llavakit.training.dataset import WORDS_PER_IMAGE, Samples
from llavakit.training.lora_targets import targets_of
from llavakit.training.parameter_groups import Rates, freeze_all_but, optimizer_groups, top_level_parts
from llavakit.training.recipe import Lora, PartTraining, Stage

SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
BYTE_LEVEL = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
FILES = {
    "legacy": "tokenizer-sp/tokenizer_legacy.json",
    "nonlegacy": "tokenizer-sp/tokenizer_nonlegacy.json",
    "bpe": "tokenizer-bpe/tokenizer_bpe.json",
}


def load_tokenizer(name: str, file: Path, special: Mapping[str, str] | None = None) -> Any:
    """The tokenizer that the cases call legacy, nonlegacy or bpe."""
    from transformers import PreTrainedTokenizerFast

    special = special or (BYTE_LEVEL if name == "bpe" else SENTENCEPIECE)
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **special)


def tokenizers(case: Case, names: Sequence[str] = tuple(FILES)) -> dict[str, Any]:
    """Tokenizers of the neighbouring cases by name."""
    return {name: load_tokenizer(name, case.sibling(FILES[name])) for name in names}


# Templates and tokenisation


def conversation(case: Case) -> Iterator[Example | Result]:
    """Prompt strings of all templates."""
    case.informational("config.templates.*", "config.aliases", "config.aliases.*")
    ignored = {}
    for name, facts in case.config["templates"].items():
        for key, turns in case.inputs.items():
            if isinstance(_wanted(case, name, key), dict):
                ignored[f"{name}.{key}*"] = "the original adds a missing separator and fails; llavakit writes the text"
                continue
            compute = partial(_prompt, name, facts["version"], turns)
            yield Example(f"{name}.{key}", compute, f"{name}.{key}")
    if ignored:
        yield Result(json={path.split(".")[0]: {} for path in ignored}, ignored=ignored)


def _wanted(case: Case, name: str, key: str) -> Any:
    return ((case.wanted.json or {}).get(name) or {}).get(key)


def _prompt(template: str, version: str, turns: Sequence[Sequence[Any]]) -> Any:
    texts = [(role, text[0] if isinstance(text, list) else text or "") for role, text in turns]
    if isinstance(turns[0][1], list):  # text and image apart, as the chat front end hands them over
        question = texts[0][1].replace("<image>", "").strip()
        if "mmtag" in version:
            texts[:1] = [(0, "<Image><image></Image>"), (1, "Received."), (0, question)]
        else:
            texts[0] = (0, "<image>\n" + question)
    opened = texts[-1] == (1, "")
    messages = turns_to_messages(texts[:-1] if opened else texts)
    return prompt_text(template, messages, placement="keep", add_generation_prompt=opened)


def prompt_tokenisation(case: Case) -> Iterator[Example]:
    """Ids of prompts with placeholders."""
    case.informational("config.tokenizers")
    token = case.config.get("image_token_index", IMAGE_PLACEHOLDER)
    prompts = case.inputs["prompts"]

    def ids(tok: Any, text: str) -> list[int]:
        return [token if i == IMAGE_PLACEHOLDER else i for i in tokenize(text, tok)[0]]

    for name in case.wanted.json:
        tok = tokenizers(case, [name])[name]
        yield from examples(partial(ids, tok), prompts, name)


def tokenizer(case: Case) -> dict[str, Any]:
    """Ids and pieces of strings."""
    case.informational("config.add_bos_token")
    special = {f"{name}_token": case.config[name] for name in ("bos", "eos", "unk", "pad") if case.config.get(name)}
    case.informational("config.bos")  # null where the tokenizer has none
    strings = case.inputs["strings"]
    found: dict[str, Any] = {}
    for name, file in case.config["files"].items():
        tok = load_tokenizer(name, case.sibling(file, FILES.get(name, file)), special)
        ids = [tokenize(text, tok)[0] for text in strings]
        found[name] = ids
        found[f"pieces_{name}"] = [tok.convert_ids_to_tokens(row) for row in ids]
    if len(case.config["files"]) == 1:
        found["ids"] = found[next(iter(case.config["files"]))]
    return found


def stopping(case: Case) -> dict[str, Any]:
    """Whether a stop string is found after every generated token."""
    case.informational("config.tokenizer")  # in words; the prompt's ids show which it is
    prompt, keywords = case.config["prompt_ids"], case.config["keywords"]
    known = tokenizers(case, ("nonlegacy", "legacy"))
    tok = next((tok for tok in known.values() if _writes(tok, prompt)), known["nonlegacy"])
    stop = KeywordStop(keywords, tok, len(prompt))
    steps = [
        [bool(stop(torch.tensor([[*prompt, *row[: step + 1]]]))) for step in range(len(row))]
        for row in case.inputs["generated"]
    ]
    return {"stop_after_step": steps}


def _writes(tok: Any, ids: Sequence[int]) -> bool:
    return tokenize(tok.decode(ids, skip_special_tokens=False).removeprefix(tok.bos_token), tok)[0] == list(ids)


def loading(case: Case) -> dict[str, Any]:
    """Model names and the templates inferred from them."""
    names = [model_name(path) for path in case.inputs["paths"]]
    return {"names": names, "conv_mode": [inferred_template(name) for name in names]}


# Labels


def messages_of(turns: Sequence[Mapping[str, str]]) -> list[Message]:
    """Messages of LLaVA turns; their images are names only."""
    images = sum(turn["value"].count("<image>") for turn in turns)
    record = {"conversations": [{"from": "human", **turn} for turn in turns]}
    return from_llava(record | ({"image": ["-"] * images} if images else {}))


def label_masking(case: Case) -> Iterator[Example]:
    """Ids and labels of training samples."""
    case.informational("config.has_image", "config.tokenizers_version", "config.image_token_index")
    config, inputs = case.config, case.inputs
    ignore = config.get("ignore_index", IGNORE)
    symbol = case.source["symbol"]

    def labels(template: str, tok: Any, turns: Sequence[Mapping[str, str]], **options: Any) -> dict[str, Any]:
        sample = training_sample(text_processor(tok, template), messages_of(turns), **options)
        kept = {"input_ids": sample["input_ids"], "labels": [ignore if t == IGNORE else t for t in sample["labels"]]}
        return kept | {"mismatch_warning": sample["fully_masked"]}

    def caption(tok: Any, turns: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        found = labels(config["template"], tok, turns)
        return {name: found[name] for name in ("input_ids", "labels")}

    if symbol.startswith("preprocess_plain"):
        for name in case.wanted.json:
            yield from examples(partial(caption, tokenizers(case, [name])[name]), inputs["samples"], name)
        return
    # the symbol says which counting rule made the labels: none for the first LLaVA, rounds since, once miscounted
    counted = not symbol.startswith("preprocess (")
    miscounted = symbol.startswith("preprocess_mpt") and case.source["repo"] == "haotian-liu/LLaVA"
    options = {"placement": "keep", "labels": "rounds" if counted else None, "max_length": config["model_max_length"]}
    for name in config["templates"]:
        for kind, tok in tokenizers(case, config.get("tokenizers", ("legacy", "nonlegacy"))).items():
            path = f"{name}.{kind}" if "tokenizers" in config else kind
            compute = partial(labels, f"{name}_miscounted" if miscounted else name, tok, **options)
            yield from examples(compute, inputs, path)


# Training data


def training_data(case: Case) -> dict[str, Any]:
    """Placement of images in turns, or the collator."""
    inputs = case.inputs
    if "sources" in inputs:
        return {"runs": [_placed(run, inputs["sources"]) for run in case.wanted.json["runs"]]}
    collator = Collator(case.config["pad_token_id"], case.config.get("model_max_length"), mask_by_pad_id=True)
    samples = [
        {"input_ids": ids, "labels": labels} for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True)
    ]
    return {name: value.tolist() for name, value in collator(samples).items()}


def _placed(run: Mapping[str, Any], sources: Sequence[Any]) -> dict[str, Any]:
    before, after = ("<Image>", "</Image>") if "mmtag" in run["template"] else ("", "")
    if run["mm_use_im_start_end"]:
        before, after = before + "<im_start>", "<im_end>" + after
    placed = [
        to_llava(media_first(messages_of(turns), before=before, after=after, collapse=True))["conversations"]
        for turns in sources
    ]
    return {key: run[key] for key in ("template", "mm_use_im_start_end")} | {"result": placed}


def data_conversion(case: Case) -> Iterator[Example]:
    """ScienceQA problems as prompts and LLaVA records; formats are named by the outputs."""
    problems, letters = take(case.inputs), case.config["options"]
    for name in case.wanted.json["prompts"]:
        form, _, flag = name.partition(" ")
        test = flag == "is_test"
        prompt = partial(scienceqa.prompt, form=form, use_caption=test, test=test, letters=letters)
        yield from examples(lambda problem, prompt=prompt: list(prompt(problem)), problems, f"prompts.{name}")
    for name in case.wanted.json:
        if name.startswith("llava_train_"):
            convert = partial(scienceqa.to_llava, problems, form=name.removeprefix("llava_train_"))
            yield Example(name, convert, name)


# Sampler


def sampler(case: Case) -> Iterator[Example]:
    """Orders of length- and modality-grouped samplers, their chunks and lengths."""
    case.informational("config.*")
    inputs = case.inputs
    if "calls" in inputs:
        deal = lambda call: even_chunks(call["indices"], call["lengths"], call["num_chunks"])  # noqa: E731
        yield from examples(deal, inputs["calls"], "chunks")
    if "data" in inputs:
        records = [Record([], "case", number, raw) for number, raw in enumerate(take(inputs["data"]))]
        samples = Samples(records, text_processor(byte_tokenizer(), "v1"))
        yield from examples(lambda n: abs(samples.words(n, WORDS_PER_IMAGE)), range(len(records)), "lengths")
        yield from examples(samples.words, range(len(records)), "modality_lengths")
    if "runs" in inputs:
        yield from examples(_orders, inputs["runs"], "runs")
    if "single_modality" in inputs:
        compute = partial(_orders, inputs["single_modality"])
        yield Example("single_modality", lambda: compute()["modality_global_seed"], "single_modality")


def _orders(run: Mapping[str, Any]) -> dict[str, list[int]]:
    lengths, sizes = run["lengths"], (run["batch_size"], run["world_size"])

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    orders = {
        "modality_global_seed": modality_grouped(lengths, *sizes, seeded(run["seed"])),
        "length_only_global_seed": length_grouped([abs(x) for x in lengths], *sizes, seeded(run["seed"])),
    }
    if "generator_seed" in run:
        own = seeded(run["generator_seed"])
        orders["modality_with_generator"] = modality_grouped(lengths, *sizes, seeded(run["seed"]), order_generator=own)
    return orders


# Optimiser groups


def parameter_groups(case: Case) -> dict[str, Any]:
    """Trained parameters, optimiser groups and LoRA targets of both stages for a model with the case's names."""
    case.informational("config.vision_tower")
    model = skeleton(case.wanted.json["all_parameters"])
    parts = [part for part in top_level_parts(model) if part != "vision_tower"]

    def groups(train: Mapping[str, PartTraining]) -> list[dict[str, Any]]:
        freeze_all_but(model, train)
        rates = Rates(case.config["learning_rate"], case.config["weight_decay"], train)
        return [
            {"lr": group["lr"], "weight_decay": group["weight_decay"], "params": sorted(group["names"])}
            for group in optimizer_groups(model, rates)
        ]

    everything = {part: PartTraining() for part in parts}
    found: dict[str, Any] = {
        "all_parameters": [name for name, _ in model.named_parameters()],
        "lora_targets": lora_targets(),
        "stage2_groups_no_projector_lr": groups(everything),
    }
    for key in case.wanted.json:
        if rate := re.fullmatch(r"stage2_groups_projector_lr_(.+)", key):
            found[key] = groups(everything | {"mm_projector": PartTraining(learning_rate=float(rate[1]))})
    found["stage1_groups"] = groups({"mm_projector": PartTraining()})
    found["stage1_trainable"] = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return found


def lora_targets() -> list[str]:
    """Names of the layers that a LoRA stage of LLaVA-1.5 adapts, whatever the model's size."""
    model = LlavakitForConditionalGeneration(one_token_media())
    train = {"multi_modal_projector": PartTraining()}
    targets = targets_of(model, Stage(name="lora", train=train, lora=Lora(), learning_rate=1e-4))
    return sorted({name.rpartition(".")[2] for name in targets.linear})


def skeleton(names: Sequence[str]) -> nn.Module:
    """A module with exactly these parameters, one number each; norms, embeddings and linear layers by their names."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        module = root
        for depth, part in enumerate(path):
            if part not in module._modules:
                module.add_module(part, _layer(part) if depth == len(path) - 1 else nn.Module())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(torch.zeros(1)))
    return root


def _layer(name: str) -> nn.Module:
    if "norm" in name:
        layer: nn.Module = nn.LayerNorm(1)
    else:
        layer = nn.Module() if "embed" in name else nn.Linear(1, 1)
    layer._parameters.clear()
    return layer


def _json(adapter: Callable[[Case], Any], *echoes: str) -> Callable[[Case], Result]:
    return component(echoes=echoes)(lambda case: Result(json=adapter(case)))


ADAPTERS: dict[str, Callable[[Case], Any]] = {
    "conversation": conversation,
    "prompt_tokenisation": prompt_tokenisation,
    "tokenizer": _json(tokenizer),
    "decoding": _json(stopping),
    "loading": _json(loading),
    "label_masking": label_masking,
    "training_data": _json(training_data, "runs.*.template", "runs.*.mm_use_im_start_end"),
    "data_conversion": data_conversion,
    "sampler": sampler,
    "training": _json(parameter_groups, "all_parameters"),
}
