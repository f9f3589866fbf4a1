"""`dpo`: a policy learns to prefer the chosen answers of pairs, held near what the stage started from.

    objective: {type: dpo, loss: sigmoid, beta: 0.1, label_smoothing: 0.0, reference_free: false, sft: 0.0}

**Layout.** Both answers share one prompt. Where the decoder can attend in forks (`llavakit.language.packed`), all pairs
of a batch are one row without padding, each as `prompt | chosen | rejected`: media and prompt are computed once, the
second answer does not see the first, and what all prompts begin with is there once. Otherwise (language adapters,
connectors that read the prompt) a pair is two padded rows. Logits are computed where they predict an answer, nowhere
else.

**Reference.** What the stage started from, whatever that was: before the first step its log-probabilities of all
planned pairs are computed once and kept in `reference.safetensors` of the stage's folder, where a run that goes on
after a kill finds them. No second model is kept, and the first step's rewards are 0.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llavakit.data.collate import one_row
from llavakit.data.preference import PreferenceRecord, check_answers, read_preference
from llavakit.data.records import Record
from llavakit.errors import RecipeError, RecordError, UserError
from llavakit.language.packed import can_narrow, can_share, packed_attention, packed_row, switch_on
from llavakit.training import distributed
from llavakit.training.dataset import Failure, StageCollator, plan_batches
from llavakit.training.objectives.base import Loss, Run, Step
from llavakit.training.objectives.language import LanguageObjective
from llavakit.training.objectives.preference import (
    IGNORE,
    LOSSES,
    Pairs,
    Targets,
    counts_of,
    pair_losses,
    sums_by,
    targets_of,
)
from llavakit.training.recipe import ObjectiveOptions

REFERENCE = "reference.safetensors"
ANSWERS = ("chosen", "rejected")
MEDIA = ("pixel_values", "visual_sizes", "visual_modalities", "visual_regions")


class DPOOptions(ObjectiveOptions):
    """Options of `dpo`.

    Attributes:
        loss: See `llavakit.training.objectives.preference`.
        beta: Strength of the pull towards the reference.
        label_smoothing: Share of pairs that are taken to be labelled the wrong way; for "sigmoid".
        reference_free: Without a reference; rewards are then beta times log-probabilities.
        weight: Factor of the preference loss.
        sft: Factor of the cross entropy of the chosen answers, which is added.
    """

    loss: Literal["sigmoid", "hinge", "ipo", "kto_pair"] = "sigmoid"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    reference_free: bool = False
    weight: float = Field(1.0, ge=0)
    sft: float = Field(0.0, ge=0)


def pair_of(chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> dict[str, Any]:
    """The sample of a pair from those of both answers, which share their media.

    Returns:
        `input_ids` and `labels` [prefix + both continuations], `fork` (where the prefix ends and the first
        continuation ends), and the media. The prefix is as long as both are alike, answers included, but each
        continuation has at least one token.

    Raises:
        UserError: If tokens are weighted.
    """
    if "label_weights" in chosen:
        raise UserError("labels: weights of tokens have no meaning for preferences; take them out")
    rows = [torch.as_tensor(sample["input_ids"]) for sample in (chosen, rejected)]
    labels = [torch.as_tensor(sample["labels"]) for sample in (chosen, rejected)]
    shortest = min(map(len, rows)) - 1
    same = (rows[0][:shortest] == rows[1][:shortest]) & (labels[0][:shortest] == labels[1][:shortest])
    prefix = int(same.long().cumprod(0).sum())
    media = {name: chosen[name] for name in MEDIA if name in chosen}
    pair = {
        "input_ids": torch.cat([rows[0], rows[1][prefix:]]),
        "labels": torch.cat([labels[0], labels[1][prefix:]]),
        "fork": (prefix, len(rows[0])),
    }
    return pair | media


def answers_of(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both answers of a pair's sample as samples of their own; the inverse of `pair_of`."""
    prefix, first = pair["fork"]
    media = {name: pair[name] for name in MEDIA if name in pair}
    rows = []
    for begin, end in ((prefix, first), (first, len(pair["input_ids"]))):
        own = {name: torch.cat([pair[name][:prefix], pair[name][begin:end]]) for name in ("input_ids", "labels")}
        rows.append(own | media)
    return rows


class PairCollator:
    """Batches of pairs.

    Gives what the model takes, with `targets` (sources, ids, owners; the owners number all chosen answers and then all
    rejected ones), `keys` of the pairs, and in forked batches `position_ids`, from which attention knows the forks.

    Args:
        inner: Lays single answers together where pairs are not forked; chosen ones first.
        forked: Whether a pair is one stretch of the one row.
    """

    def __init__(self, inner: StageCollator, forked: bool) -> None:
        self.inner, self.forked = inner, forked

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any] | Failure:
        failed = next((sample for sample in samples if isinstance(sample, Failure)), None)
        if failed is not None:
            return failed
        batch = self._forked(samples) if self.forked else self._rows(samples)
        return batch | {"keys": torch.tensor([sample["key"] for sample in samples])}

    def _rows(self, samples: Sequence[Any]) -> dict[str, Any]:
        chosen, rejected = zip(*map(answers_of, samples), strict=True)
        batch = self.inner([*chosen, *rejected])
        return batch | {"targets": tuple(targets_of(batch["labels"]))}

    def _forked(self, samples: Sequence[Any]) -> dict[str, Any]:
        shared = self.inner.cut([prompt_of(sample) for sample in samples])
        cuts = [0, *[shared] * (len(samples) - 1)]
        positions, begin = [], 0
        sources, ids, owners = [], [], []
        for number, (sample, cut) in enumerate(zip(samples, cuts, strict=True)):
            (prefix, first), end = sample["fork"], len(sample["input_ids"])
            place = torch.arange(end)
            positions.append(torch.where(place < first, place, place - first + prefix)[cut:])
            for answer, (start, stop) in enumerate(((prefix, first), (first, end))):
                places = torch.cat([place[1:prefix], place[max(start, 1) : stop]])
                places = places[sample["labels"][places] != IGNORE]
                before = places - 1
                if start:  # both continuations follow the prefix
                    before = torch.where(places == start, torch.tensor(prefix - 1), before)
                sources.append(before + begin - cut)
                ids.append(sample["labels"][places])
                owners.append(torch.full_like(places, answer * len(samples) + number))
            begin += end - cut
        batch = self.inner.named(one_row(samples, cuts), samples)
        batch.pop("labels")
        targets = (torch.cat(sources), torch.cat(ids), torch.cat(owners))
        return batch | {"position_ids": torch.cat(positions)[None], "targets": targets}


def prompt_of(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Ids and labels of what both answers of a pair's sample begin with."""
    return {name: pair[name][: pair["fork"][0]] for name in ("input_ids", "labels")}


class DPO(LanguageObjective):
    """Direct preference optimisation of a whole model on pairs."""

    Options = DPOOptions
    streams = False
    by_position = True
    forked = False

    # from records to batches

    def bind(self, config: Any, processor: Any) -> None:
        """See `LanguageObjective.bind`; the terms of this loss have factors of their own."""
        if self.stage.loss_weights.text != 1.0:
            raise RecipeError("loss_weights.text: objective 'dpo' has weight and sft instead")
        if self.stage.packing == "stream":
            raise RecipeError("packing: a pair is never cut; use true instead of stream")
        super().bind(config, processor)

    def read(self, raw: Any, file: str, line: int, **options: Any) -> Record:
        """A preference record, see `llavakit.data.preference`."""
        return read_preference(raw, file, line, **options)

    def encode(self, record: Record, *, media: bool = True) -> dict[str, Any]:
        """The pair's sample, see `pair_of`; its media are opened once."""
        if not isinstance(record, PreferenceRecord):
            raise UserError("a preference record is needed: prompt, chosen, rejected")
        both = []
        for answer in ANSWERS:
            messages = record.answered(getattr(record, answer))
            whole = Record(messages, record.file, record.line, record.raw)
            if both:
                both.append(self.processor.encode(messages, pixels=False, **self.conversations.options))
            else:
                both.append(self.conversations.encode(whole, media=media))
        notes = both[0].get("notes", ())
        return pair_of(*both) | {"key": key_of(record, both), "notes": notes}

    def check(self, sample: dict[str, Any], record: Record) -> dict[str, Any]:
        """The pair as it is: nothing of it is ever cut.

        Raises:
            RecordError: If it is too long, an answer is empty or without labels, or both are the same.
        """
        check_answers(record)
        rows, limit = answers_of(sample), self.stage.max_length
        for answer, row in zip(ANSWERS, rows, strict=True):
            if not (row["labels"][1:] != IGNORE).any():
                raise RecordError(record.file, record.line, answer, "no answer is left to learn: its labels are masked")
        longest = len(sample["input_ids"]) if self.stage.packing else max(len(row["input_ids"]) for row in rows)
        if limit is not None and longest > limit:
            what = "prompt and both answers take" if self.stage.packing else "prompt and answer take"
            problem = f"{what} {longest} tokens, max_length is {limit}; pairs are not cut"
            raise RecordError(record.file, record.line, "record", problem)
        return sample

    def collator(self, run: Run) -> Callable[[Sequence[Any]], Any]:
        """Forked or padded pairs."""
        stand_ins = self._stand_ins(run)
        self.forked = self.forked and not stand_ins
        return self._collator(stand_ins)

    def _collator(self, stand_ins: Mapping[Any, Any] | None = None) -> PairCollator:
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id
        pad = pad if pad is not None else tokenizer.eos_token_id or 0
        features = self.conversations.features is not None
        placeholder = self.processor.image_token_id if self.shares else None
        inner = StageCollator(pad, features=features, placeholder=placeholder, stand_ins=stand_ins)
        return PairCollator(inner, self.forked)

    # learning

    def begin(self, run: Run) -> None:
        """Choose the layout; compute the reference's log-probabilities of all planned pairs, or read them."""
        super().begin(run)
        self.flat = False  # packing here plans batches; rows are laid out by this objective
        self.use(run.module)
        self.reference: dict[int, tuple[float, float]] = {}
        if self.options.reference_free:
            return
        path = run.folder / REFERENCE
        samples = run.samples
        ranks = (plan_batches(samples, self.stage, run.seed, world=run.world, rank=rank) for rank in range(run.world))
        planned = sorted({index for batches in ranks for batch in batches for index in batch})
        if distributed.is_main():
            known, missing = read_reference(path), planned
            if known:
                keys = functools.partial(self.encode, media=False)
                missing = [index for index in planned if samples.dataset.sample(index, keys)["key"] not in known]
            if missing:
                known |= self._measure(run, missing)
                write_reference(path, known)
        distributed.barrier()
        self.reference = read_reference(path)

    def use(self, module: nn.Module) -> None:
        """Prepare for a module: whether its decoder attends in forks, prompts share and the last layer is narrow."""
        self.net = module
        self.forked = not module.model.reads_prompt and switch_on(module)
        self.shares = self.forked and can_share(module)
        self.narrow = self.forked and can_narrow(module)

    def _measure(self, run: Run, indices: Sequence[int]) -> dict[int, tuple[float, float]]:
        """The reference's log-probabilities of pairs, by key."""
        stage, module = self.stage, run.module
        if stage.lora is None and any(run.folder.glob("checkpoint-*")):  # the module in memory has learned already
            module, _ = run.start()
            self.fit(module)
            module.to(run.module.dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        was_training = module.training
        module.eval().to(device)
        if module is not run.module:
            self.use(module)
        collate, found = self._collator(), {}
        size = stage.batch_size if not stage.packing else 4 * stage.batch_size
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=stage.bf16):
            for begin in _shown(range(0, len(indices), size), run, stage.name):
                samples = [run.samples[index] for index in indices[begin : begin + size]]
                batch = _on(device, collate(samples))
                sums = self.logps(module, batch)[0].float().cpu().tolist()
                pairs = zip(batch["keys"].tolist(), sums[: len(samples)], sums[len(samples) :], strict=True)
                found |= {key: both for key, *both in pairs}
        module.train(was_training)
        if module is not run.module:
            self.use(run.module)
        return {key: tuple(both) for key, both in found.items()}

    def items(self, batch: Mapping[str, Any]) -> int:
        """Pairs."""
        return len(batch["keys"])

    def logps(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """Sums of the answers' log-probabilities, their numbers of tokens [2 x pairs] each, and the model's output.

        Chosen answers come first.
        """
        targets = Targets(*batch["targets"])
        inputs = {name: value for name, value in batch.items() if name not in ("keys", "targets")}
        options = {"targets": (targets.sources, targets.ids)}
        if "position_ids" in batch:
            with packed_attention():
                row = packed_row(batch["position_ids"][0].tolist())
                outputs = self.forward(model, inputs, packed_row=row, narrow=self.narrow, **options)
        else:
            outputs = self.forward(model, inputs, **options)
        answers = 2 * self.items(batch)
        return sums_by(targets.owners, outputs.likelihood.logps, answers), counts_of(targets.owners, answers), outputs

    def compared(self, sums: Tensor, tokens: Tensor) -> Tensor:
        """What the loss compares of answers' log-probabilities [answers]: means over tokens under `ipo`, else sums."""
        return sums / tokens if self.options.loss == "ipo" else sums

    def _known(self, keys: Sequence[int]) -> Tensor:
        """The reference's log-probabilities of chosen and then of rejected answers [2 x pairs]; zeros without one.

        Raises:
            UserError: If a pair was not there when they were computed.
        """
        if self.options.reference_free:
            return torch.zeros(2 * len(keys))
        if not all(key in self.reference for key in keys):
            raise UserError("a record changed while training ran, so its pair has no reference; start again to go on")
        return torch.tensor([self.reference[key] for key in keys], dtype=torch.float64).T.flatten()

    def loss(self, model: nn.Module, batch: dict[str, Any], step: Step) -> Loss:
        """Mean over the step's pairs; the cross entropy is a mean over the tokens of a batch, weighted by its pairs."""
        options, count = self.options, self.items(batch)
        sums, tokens, outputs = self.logps(model, batch)
        reference = self._known(batch["keys"].tolist()).to(sums)
        policy, reference = self.compared(sums, tokens), self.compared(reference, tokens)
        pairs = Pairs(*policy.chunk(2), *reference.chunk(2))
        losses, chosen, rejected = pair_losses(
            pairs,
            options.loss,
            beta=options.beta,
            label_smoothing=options.label_smoothing,
            reference_free=options.reference_free,
        )
        sft = -sums[:count].sum() / tokens[:count].sum()
        share = count / step.items
        preference = losses.mean()
        total = options.weight * preference
        if options.sft:
            total = total + options.sft * sft
        logged = {
            "dpo_loss": preference,
            "sft_loss": sft,
            "reward_chosen": chosen.mean(),
            "reward_rejected": rejected.mean(),
            "reward_margin": (chosen - rejected).mean(),
            "reward_accuracy": (chosen > rejected).float().mean(),
            "logp_chosen": policy[:count].mean(),
            "logp_rejected": policy[count:].mean(),
            "reference_logp_chosen": reference[:count].mean(),
            "reference_logp_rejected": reference[count:].mean(),
        }
        value = total * share
        if outputs.aux_loss is not None:
            value = value + outputs.aux_loss * (self.stage.loss_weights.auxiliary / step.batches)
            logged["auxiliary"] = outputs.aux_loss
        return Loss(value, {name: number.detach() for name, number in logged.items()})


def key_of(record: Record, both: Sequence[Mapping[str, Any]]) -> int:
    """A number that a pair is known by, from where it stands and what its answers' tokens are; positive int64."""
    said = f"{record.file}\n{record.line}\n{[list(map(int, sample['input_ids'])) for sample in both]}"
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big") >> 1


def read_reference(path: Path) -> dict[int, tuple[float, float]]:
    """Log-probabilities of chosen and rejected answers by key; empty without the file."""
    if not path.is_file():
        return {}
    found = load_file(path)
    return dict(zip(found["keys"].tolist(), map(tuple, found["logps"].tolist()), strict=True))


def write_reference(path: Path, known: Mapping[int, tuple[float, float]]) -> None:
    """Write them; the file appears whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    logps = torch.tensor(list(known.values()), dtype=torch.float32).reshape(-1, 2)
    save_file({"keys": torch.tensor(list(known)), "logps": logps}, scratch)
    scratch.replace(path)


def _on(device: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _on(device, item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on(device, item) for item in value)
    return value


def _shown(steps: range, run: Run, name: str) -> Iterator[int]:
    with run.console.status(f"{name}: log-probabilities of the reference"):
        yield from steps


__all__ = ["DPO", "LOSSES", "DPOOptions", "PairCollator", "answers_of", "pair_of"]
