"""LLaVA-Critic's golden components of preference training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig

from llavakit.checkpoints.layouts import rename_with
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.conversation.messages import media_first, normalise
from llavakit.data.preference import read_preference
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import (
    check_keys,
    one_token_media,
    picture,
    published_model,
    text_processor,
    training_sample,
    view_processor,
    views_of,
)
from llavakit.proof.golden import Case, Example, Result, examples, take
from llavakit.registry import LAYOUTS
from llavakit.training.dataset import StageCollator
from llavakit.training.objectives.base import Step
from llavakit.training.objectives.dpo import DPO, PairCollator, answers_of, pair_of
from llavakit.training.objectives.preference import Pairs, pair_losses, sequence_logps, targets_of, token_logps
from llavakit.training.recipe import Stage
from llavakit.views.plan import MediaSize

TEMPLATE = "qwen_1_5_preference"
LAYOUT = "llava-onevision-classic"
ANSWERS = ("chosen", "rejected")


def load_tokenizer(case: Case) -> Any:
    """The case's tokenizer with Qwen2's special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(case.sibling("tokenizer.json")),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


# Arithmetic


def dpo_loss(case: Case) -> list[Example]:
    """Losses and rewards of every variant."""
    given = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    pairs = Pairs(*(case.tensors[name] for name in given))

    def computed(name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
        options = take(options)
        loss = options.pop("loss_type", "sigmoid")
        found = pair_losses(pairs, loss, **options)
        names = ("losses", "chosen_rewards", "rejected_rewards")
        return {f"{name}/{key}": value for key, value in zip(names, found, strict=True)}

    return [
        Example(name, partial(computed, name, options), None, (f"{name}/*",)) for name, options in case.inputs.items()
    ]


def dpo_logps(case: Case) -> Result:
    """Log-probabilities of rows, and the mean cross entropy of their tokens."""
    logits, labels = case.tensors["logits"], case.tensors["labels"]
    targets = targets_of(labels)
    loss = -token_logps(logits.flatten(0, 1), targets.ids, targets.sources).mean()
    found = {name: sequence_logps(logits, labels, average=name == "mean") for name in ("sum", "mean")}
    return Result(json={"sft_loss": loss.item()}, tensors=found)


# Batches


def rows_of(samples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """Padded rows of samples, as the stage's collator makes them."""
    return StageCollator(pad)([{"visual_modalities": (), **sample} for sample in samples])


def dpo_concatenate(case: Case) -> dict[str, Any]:
    """Both answers of every pair in one batch, chosen ones first."""
    given, samples = take(case.inputs["batch"]), []
    for answer in ANSWERS:
        masks = given[f"{answer}_attention_mask"]
        rows = zip(given[f"{answer}_input_ids"], given[f"{answer}_labels"], masks, strict=True)
        for ids, labels, mask in rows:
            kept = [place for place, real in enumerate(mask) if real]
            own = {"input_ids": [ids[place] for place in kept], "labels": [labels[place] for place in kept]}
            samples.append({name: torch.tensor(values) for name, values in own.items()} | {"visual_modalities": ()})
    count = len(samples) // 2
    pairs = [
        pair_of(chosen, rejected) | {"key": number}
        for number, (chosen, rejected) in enumerate(zip(samples[:count], samples[count:], strict=True))
    ]
    batch = PairCollator(StageCollator(case.config["padding_value"]), forked=False)(pairs)
    found = {f"concatenated_{name}": batch[name] for name in ("input_ids", "labels", "attention_mask")}
    found = {name: tensor.tolist() for name, tensor in found.items()}
    # a pair holds its media once; each of its rows sees them
    seen = {"concatenated_images": "images", "image_sizes": "image_sizes", "modalities": "modalities"}
    return found | {name: given[own] * 2 for name, own in seen.items()}


def objective_of(tokenizer: Any, **options: Any) -> DPO:
    """The objective as a stage makes it, with a processor for text."""
    stage = {"name": "dpo", "train": ["language_model"], "learning_rate": 0.0}
    objective = DPO(Stage.model_validate(stage | {"objective": {"type": "dpo", **options}}))
    objective.bind(one_token_media(), text_processor(tokenizer, TEMPLATE))
    return objective


def media_of(options: Mapping[str, Any], size: int) -> dict[str, Any]:
    """`config.media` of the original's arguments; what images become does not depend on their number there."""
    ratio = str(options.get("image_aspect_ratio"))
    if ratio.startswith("anyres"):
        views = {"type": "anyres", "size": size, "pinpoints": take(options["image_grid_pinpoints"])}
    else:
        views = {"type": "pad" if ratio == "pad" else "squash", "size": size}
    return {"image": {"views": views}}


def dpo_data(case: Case) -> Iterator[Example | Result]:
    """Records and pixels to items, and the batch of all of them."""
    case.informational("config.data_args.*")
    tokenizer, size = load_tokenizer(case), case.config["size"]
    views = view_processor(media_of(case.config["data_args"], size), {"image_size": size, "patch_size": size})
    processor = text_processor(tokenizer, TEMPLATE)
    tiled = str(case.config["data_args"]["image_aspect_ratio"]).startswith("anyres")
    fetch = case.inputs["fetch"]
    records = [
        read_preference(take(record), "case", number + 1, check_files=False)
        for number, record in enumerate(case.inputs["records"])
    ]

    def prompt_of(record: Any) -> str:
        (turn,) = record.messages
        if any(part["type"] == "image" for part in turn["content"][1:]):  # the template of preferences moves it
            (turn,) = media_first([turn])
        return "".join("<image>" if part["type"] == "image" else part["text"] for part in turn["content"])

    def item(index: int) -> dict[str, Any]:
        record = records[index]
        names = [part["image"] for part in record.messages[0]["content"] if part["type"] == "image"]
        images = []
        for name in names:
            image = picture(case.tensors[str(name).removeprefix("/")]).convert("RGB")
            cut = views_of(views, "image", image)
            shape = torch.stack(cut).shape if tiled else cut[0].shape
            images.append({"shape": list(shape), "size": list(image.size), "modality": "image"})
        return {
            "prompt": prompt_of(record),
            "chosen": record.chosen,
            "rejected": record.rejected,
            "has_image": bool(names),
            "images": images,
        }

    yield from examples(item, fetch, "items")

    def batch() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for answer in ANSWERS:
            samples = [
                training_sample(processor, records[index].answered(getattr(records[index], answer))) for index in fetch
            ]
            rows = rows_of(samples, tokenizer.pad_token_id)
            found |= {f"{answer}_{name}": rows[name].tolist() for name in ("input_ids", "labels", "attention_mask")}
        return found

    yield Example("batch", batch, "batch")
    columns = {"images": "shape", "image_sizes": "size", "modalities": "modality"}
    images = [image for index in fetch for image in item(index)["images"]]
    yield Result(json={name: [image[own] for image in images] for name, own in columns.items()})


# A step


def model_of(case: Case, kind: str) -> LlavakitForConditionalGeneration:
    """The policy or the reference, opened as a published checkpoint."""
    vision = check_keys(case.config["vision"], SiglipVisionConfig().to_dict(), "config.vision")
    weights = {name.removeprefix(f"{kind}/"): t for name, t in case.weights().items() if name.startswith(f"{kind}/")}
    raw = {"model_type": "llava_qwen", "mm_projector_type": "mlp2x_gelu", **take(case.config["model_config"])}
    return published_model(raw, weights, {"model_type": "siglip_vision_model", **vision})


class Trial:
    """One variant of `dpo_step`."""

    def __init__(self, case: Case, name: str) -> None:
        self.case, self.name, self.run = case, name, case.inputs[name]
        self.tokenizer = load_tokenizer(case)
        self.processor = text_processor(self.tokenizer, TEMPLATE)

    def samples(self, model: LlavakitForConditionalGeneration, answer: str) -> tuple[list[Any], list[Any]]:
        """Ids and labels of every record before its media are in place, and samples after."""
        settings, plain, entries = self.case.config["model_config"], [], []
        for record in self.run["records"]:
            entries += [self._entry(*image) for image in record["image"]]
            content = record["prompt"]
            if record["has_image"]:
                media = [{"type": "image", "image": "x"}]
                content = [*media, {"type": "text", "text": content.removeprefix("<image>")}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": record[answer]}]
            plain.append(training_sample(self.processor, normalise(turns)))
        batch = ClassicBatch(
            model,
            [sample["input_ids"] for sample in plain],
            {IMAGE_PLACEHOLDER: entries},
            labels=[sample["labels"] for sample in plain],
            max_length=settings.get("tokenizer_model_max_length"),
        )
        return plain, batch.samples

    def _entry(self, name: str, size: Sequence[int], modality: str) -> Entry:
        views = list(self.case.tensors[f"{self.name}/{name}"])
        width, height = size
        kind = "video" if modality == "video" else "image" if len(views) > 1 else "multi_image"
        return Entry(kind, MediaSize(len(views) if kind == "video" else 1, height, width), views)

    def __call__(self) -> Result:
        """Log-probabilities, loss, metrics and gradients."""
        run, case, count = self.run, self.case, len(self.run["records"])
        objective = objective_of(
            self.tokenizer,
            loss=run["loss_type"],
            beta=run["beta"],
            weight=run.get("dpo_alpha", 1.0),
            sft=run.get("gamma", 1.0),
        )
        policy, reference = model_of(case, "policy"), model_of(case, "ref")
        plain, whole = zip(*(self.samples(policy, answer) for answer in ANSWERS), strict=True)
        pairs = [pair_of(*both) | {"key": number} for number, both in enumerate(zip(*whole, strict=True))]
        sums, shown = {}, {}
        for name, model in (("reference", reference), ("policy", policy)):
            objective.use(model)
            batch = objective._collator()(pairs)
            with torch.no_grad():
                sums[name], tokens, _ = objective.logps(model, batch)
            shown[name] = objective.compared(sums[name], tokens)
        both = sums["reference"].chunk(2)
        objective.reference = dict(enumerate(zip(*(half.tolist() for half in both), strict=True)))
        loss = objective.loss(policy, batch, Step(torch.tensor(count), 1))
        loss.value.backward()
        return Result(json=self._json(plain, loss, policy), tensors=self._tensors(shown, pairs, count))

    def _tensors(self, shown: Mapping[str, Tensor], pairs: Sequence[Any], count: int) -> dict[str, Tensor]:
        found = {}
        for name, values in shown.items():
            for answer, own in zip(ANSWERS, values.chunk(2), strict=True):
                found[f"{self.name}/{name}_{answer}_logps"] = own
        rows = [row for answer in zip(*map(answers_of, pairs), strict=True) for row in answer]
        labels = rows_of([{name: row[name] for name in ("input_ids", "labels")} for row in rows], 0)["labels"]
        for answer, own in zip(ANSWERS, (labels[:count], labels[count:]), strict=True):
            found[f"{self.name}/{answer}_labels_after_splice"] = own
        return found

    def _json(self, plain: Sequence[Sequence[Any]], loss: Any, policy: LlavakitForConditionalGeneration) -> Any:
        logged = {name: value.item() for name, value in loss.logged.items()}
        metrics = {
            "losses/dpo": logged["dpo_loss"],
            "losses/sft": logged["sft_loss"],
            "losses/total": loss.value.item(),
            "rewards/chosen": logged["reward_chosen"],
            "rewards/rejected": logged["reward_rejected"],
            "rewards/accuracies": logged["reward_accuracy"],
            "rewards/margins": logged["reward_margin"],
            "logps/chosen": logged["logp_chosen"],
            "logps/rejected": logged["logp_rejected"],
            "ref_logps/chosen": logged["reference_logp_chosen"],
            "ref_logps/rejected": logged["reference_logp_rejected"],
        }
        ids = {}
        for answer, samples in zip(ANSWERS, plain, strict=True):
            rows = rows_of([{name: s[name] for name in ("input_ids", "labels")} for s in samples], self.pad)
            ids |= {f"{answer}_input_ids": rows["input_ids"].tolist(), f"{answer}_labels": rows["labels"].tolist()}
        rename = rename_with(LAYOUTS.get(LAYOUT)().renames_out(policy.config))
        gradients = {rename(name): parameter.grad for name, parameter in policy.named_parameters()}
        norms = {name: None if grad is None else float(grad.norm()) for name, grad in gradients.items()}
        order = ("chosen_input_ids", "rejected_input_ids", "chosen_labels", "rejected_labels")
        return {
            "loss": loss.value.item(),
            "metrics": metrics,
            "grad_norms": norms,
            "input_ids": {name: ids[name] for name in order},
        }

    @property
    def pad(self) -> int:
        """The padding id."""
        return self.tokenizer.pad_token_id


def dpo_step(case: Case) -> Iterator[Example]:
    """One step of a policy against a reference."""
    for name in case.inputs:
        yield Example(name, lambda name=name: Trial(case, name)(), name, (f"{name}/*",))


ADAPTERS = {
    "dpo_loss": dpo_loss,
    "dpo_logps": dpo_logps,
    "dpo_concatenate": dpo_concatenate,
    "dpo_data": dpo_data,
    "dpo_step": dpo_step,
}
