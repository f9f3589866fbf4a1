"""Golden components of LLaVA-1.5 that concern text and data: templates, ids, labels, samplers, optimiser groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llavakit.conversation.encode import Encoded, encode, tokenize
from llavakit.conversation.messages import Message, from_llava, media_first, split_literals, to_llava
from llavakit.conversation.names import inferred_template, model_name
from llavakit.conversation.stop import KeywordStop
from llavakit.conversation.template import Rounds, Template, get_template
from llavakit.data import scienceqa
from llavakit.data.collate import Collator
from llavakit.data.sampler import even_chunks, length_grouped, length_with_media, modality_grouped, word_length
from llavakit.proof.golden import Case, Result, component
from llavakit.training.parameter_groups import Rates, freeze_all_but, linear_layers, optimizer_groups, top_level_parts
from llavakit.training.recipe import Lora, PartTraining

SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
BYTE_LEVEL = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
FILES = {
    "legacy": "tokenizer-sp/tokenizer_legacy.json",
    "nonlegacy": "tokenizer-sp/tokenizer_nonlegacy.json",
    "bpe": "tokenizer-bpe/tokenizer_bpe.json",
}


def load_tokenizer(name: str, file: Path) -> Any:
    """The tokenizer that the cases call legacy, nonlegacy or bpe."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(file), **(BYTE_LEVEL if name == "bpe" else SENTENCEPIECE))


def tokenizers(case: Case, names: Sequence[str] = tuple(FILES)) -> dict[str, Any]:
    """Tokenizers of the neighbouring cases by name."""
    return {name: load_tokenizer(name, case.sibling(FILES[name])) for name in names}


# Templates and tokenisation


def conversation(case: Case) -> dict[str, Any]:
    """Prompt strings of all templates."""
    case.informational("config.templates.*", "config.aliases*")
    dialogues = case.inputs
    return {
        name: {key: _prompt(get_template(name), facts, turns) for key, turns in dialogues.items()}
        for name, facts in case.config["templates"].items()
    }


def _prompt(template: Template, facts: Mapping[str, Any], turns: Sequence[Sequence[Any]]) -> Any:
    if facts["sep_style"] == "PLAIN" and sum(bool(text) for _, text in turns) > 1:
        return {"error": "TypeError"}  # the original adds a missing separator; ours writes the caption
    texts = [(role, text[0] if isinstance(text, list) else text or "") for role, text in turns]
    if isinstance(turns[0][1], list):  # text and image apart, as the chat front end hands them over
        question = texts[0][1].replace("<image>", "").strip()
        if "mmtag" in facts["version"]:
            texts[:1] = [(0, "<Image><image></Image>"), (1, "Received."), (0, question)]
        else:
            texts[0] = (0, "<image>\n" + question)
    messages = [{"role": ("user", "assistant")[role], "content": split_literals(text)} for role, text in texts]
    return template.render(messages, placement="keep")[0]


def prompt_tokenisation(case: Case) -> dict[str, Any]:
    """Ids of prompts with placeholders."""
    case.informational("config.image_token_index", "config.tokenizers")
    prompts = case.inputs["prompts"]
    return {name: [tokenize(text, tok)[0] for text in prompts] for name, tok in tokenizers(case).items()}


def tokenizer(case: Case) -> dict[str, Any]:
    """Ids and pieces of strings."""
    case.informational("config.bos", "config.eos", "config.unk", "config.pad", "config.add_bos_token")
    strings = case.inputs["strings"]
    found: dict[str, Any] = {}
    for name, file in case.config["files"].items():
        tok = load_tokenizer(name, case.sibling(file, FILES[name]))
        ids = [tokenize(text, tok)[0] for text in strings]
        found[name] = ids
        found[f"pieces_{name}"] = [tok.convert_ids_to_tokens(row) for row in ids]
    if len(case.config["files"]) == 1:
        found["ids"] = found[next(iter(case.config["files"]))]
    return found


def stopping(case: Case) -> dict[str, Any]:
    """Whether a stop string is found after every generated token."""
    case.informational("config.tokenizer")
    prompt, keywords = case.config["prompt_ids"], case.config["keywords"]
    known = tokenizers(case, ("nonlegacy", "legacy"))
    tok = next((tok for tok in known.values() if _writes(tok, prompt)), known["nonlegacy"])
    stop = KeywordStop(keywords, tok)
    return {
        "stop_after_step": [
            [stop([*prompt, *row[: step + 1]], len(prompt)) for step in range(len(row))]
            for row in case.inputs["generated"]
        ]
    }


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


def label_masking(case: Case) -> dict[str, Any]:
    """Ids and labels of training samples."""
    case.informational(
        "config.ignore_index", "config.image_token_index", "config.has_image", "config.tokenizers_version"
    )
    inputs, config = case.inputs, case.config
    symbol = case.source["symbol"]
    if symbol.startswith("preprocess_plain"):
        samples = [messages_of(turns) for turns in inputs["samples"]]
        return {
            name: [_ids_and_labels(encode(m, config["template"], tok)) for m in samples]
            for name, tok in tokenizers(case).items()
        }
    counted = not symbol.startswith("preprocess (")
    at_head = case.source["repo"] == "haotian-liu/LLaVA"

    def labels(template: Template, tok: Any, turns: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        if symbol.startswith("preprocess_mpt") and at_head:
            template = replace(template, rounds=forgets_the_end(template.rounds))
        encoded = encode(
            messages_of(turns),
            template,
            tok,
            placement="keep",
            labels="rounds" if counted else None,
            max_length=config["model_max_length"],
        )
        return _ids_and_labels(encoded) | {"mismatch_warning": encoded.fully_masked}

    by_template = {
        name: {
            kind: {key: labels(get_template(name), tok, turns) for key, turns in inputs.items()}
            for kind, tok in tokenizers(case, config.get("tokenizers", ("legacy", "nonlegacy"))).items()
        }
        for name in config["templates"]
    }
    return by_template if "tokenizers" in config else by_template[config["templates"][0]]


def forgets_the_end(rounds: Rounds) -> Rounds:
    """The count of the later original code, which forgets the token that closes a round."""
    return replace(rounds, counts_end=False, answer_offset=-1)


def _ids_and_labels(encoded: Encoded) -> dict[str, Any]:
    return {"input_ids": encoded.ids, "labels": encoded.labels}


# Training data


def training_data(case: Case) -> dict[str, Any]:
    """Placement of images in turns, or the collator."""
    inputs = case.inputs
    if "sources" in inputs:
        return {"runs": [_placed(run, inputs["sources"]) for run in case.wanted.json["runs"]]}
    collator = Collator(case.config["pad_token_id"], case.config["model_max_length"], mask_by_pad_id=True)
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


def data_conversion(case: Case) -> dict[str, Any]:
    """ScienceQA problems as prompts and LLaVA records; formats are named by the outputs."""
    problems, letters = case.inputs, case.config["options"]
    found: dict[str, Any] = {"prompts": {}}
    for name in case.wanted.json["prompts"]:
        form, _, flag = name.partition(" ")
        test = flag == "is_test"
        found["prompts"][name] = {
            key: list(scienceqa.prompt(problem, form, use_caption=test, test=test, letters=letters))
            for key, problem in problems.items()
        }
    for name in case.wanted.json:
        if name.startswith("llava_train_"):
            found[name] = scienceqa.to_llava(problems, form=name.removeprefix("llava_train_"))
    return found


# Sampler


def sampler(case: Case) -> dict[str, Any]:
    """Orders of length- and modality-grouped samplers, their chunks and lengths."""
    case.informational("config.*", "inputs.data.*.image", "inputs.data.*.conversations.*.from")
    inputs = case.inputs
    if "calls" in inputs:
        chunks = [even_chunks(call["indices"], call["lengths"], call["num_chunks"]) for call in inputs["calls"]]
        return {"chunks": chunks}
    if "data" in inputs:
        data = inputs["data"]
        return {"lengths": list(map(length_with_media, data)), "modality_lengths": list(map(word_length, data))}
    found: dict[str, Any] = {"runs": [_orders(run) for run in inputs["runs"]]}
    if "single_modality" in inputs:
        found["single_modality"] = _orders(inputs["single_modality"])["modality_global_seed"]
    return found


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
    decoder = [part for part in parts if part not in ("mm_projector", "lm_head")]

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
        "lora_targets": sorted({name.split(".")[-1] for name in linear_layers(model, Lora(parts=decoder))}),
        "stage2_groups_no_projector_lr": groups(everything),
    }
    for key in case.wanted.json:
        if rate := re.fullmatch(r"stage2_groups_projector_lr_(.+)", key):
            found[key] = groups(everything | {"mm_projector": PartTraining(learning_rate=float(rate[1]))})
    found["stage1_groups"] = groups({"mm_projector": PartTraining()})
    found["stage1_trainable"] = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return found


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


ADAPTERS: dict[str, Callable[[Case], Result]] = {
    "conversation": _json(conversation),
    "prompt_tokenisation": _json(prompt_tokenisation),
    "tokenizer": _json(tokenizer),
    "decoding": _json(stopping),
    "loading": _json(loading),
    "label_masking": _json(label_masking),
    "training_data": _json(training_data, "runs.*.template", "runs.*.mm_use_im_start_end"),
    "data_conversion": _json(data_conversion),
    "sampler": _json(sampler),
    "training": _json(parameter_groups, "all_parameters"),
}
