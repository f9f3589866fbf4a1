"""Running a recipe: stage after stage, each from where it stands.

output/
  recipe.yaml                 the recipe with its overrides, as it was run
  cache/                      features of frozen encoders (`cache_features`)
  STAGE/
    metrics.json              loss curve and facts, see `training.callbacks`
    checkpoint-N/             whole checkpoints of the running stage: model, optimiser, schedule, random states
    base/                     with LoRA: the model that is adapted, if it is nowhere else on disk
    adapter/                  with LoRA: PEFT's adapter
    final/                    the stage's model: a llavakit checkpoint with its processor (`lora.merge: false`: the
                              adapter alone)
  final/                      the last stage's model

Before the first step everything that is still to run is checked (`training.check`). A stage whose `final` is there is
finished and skipped; one with checkpoints resumes from the newest. Both say which recipe, data and base made them
(`training.json`), so that changed ones never pass for the old ones.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn
from transformers import TrainingArguments, set_seed

from llavakit.checkpoints.adapter_base import move_record
from llavakit.checkpoints.convert import save
from llavakit.checkpoints.files import atomic_folder, clear_write_errors
from llavakit.checkpoints.opening import local_folder, open_checkpoint
from llavakit.data.mixture import check_choice
from llavakit.data.records import BadRecords
from llavakit.data.stream import RecordStream
from llavakit.data.strict_json import read_json
from llavakit.errors import RecipeError
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.training import distributed, schedules, summary
from llavakit.training.callbacks import Bar, Metrics
from llavakit.training.check import check_recipe, named
from llavakit.training.dataset import PreparedSamples, global_batch, open_records, plan_batches
from llavakit.training.fingerprint import STAMP, Content, check_stamp, fingerprint, stamp_text
from llavakit.training.heldout import Samples, read_questions
from llavakit.training.lora import merged_state, prepare, save_adapter
from llavakit.training.memory import give_back_at_once
from llavakit.training.objectives.base import Run, objective_of
from llavakit.training.outcome import conclude
from llavakit.training.parameter_groups import trainable_by_part
from llavakit.training.recipe import Recipe, Stage, load_recipe
from llavakit.training.recompute import recompute
from llavakit.training.streaming import StreamBatches, StreamSamples, read_state
from llavakit.training.trainer import StageTrainer, checkpoints


@dataclass
class StageResult:
    """What a stage left behind.

    Attributes:
        name: The stage.
        folder: Its folder; `folder / "final"` is a checkpoint.
        metrics: Contents of its `metrics.json`.
        ran: False if it had been finished before.
    """

    name: str
    folder: Path
    metrics: dict[str, Any]
    ran: bool


@dataclass
class TrainResult:
    """What a run left behind."""

    output: Path
    stages: list[StageResult]

    @property
    def final(self) -> Path:
        """The finished model."""
        return self.output / "final"


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    records: Any = None,
    check: str = "sample",
    console: Console | None = None,
) -> TrainResult:
    """Run every stage of a recipe, or what is left of it.

    Args:
        recipe: YAML file, or a recipe that was read already.
        overrides: `dotted.key=value`; only with a file.
        records: Learn from these (`llavakit.data.records.Record`) instead of the recipe's sources.
        check: How many records are looked at before the first step: "sample" or "all", see `training.check`.
        console: Where progress is shown.

    Returns:
        Folders and metrics.

    Raises:
        UserError: One clear line; what was finished stays finished.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    console = console or Console(stderr=True)
    if not torch.cuda.is_available():
        give_back_at_once()
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"report_to: {name} is not installed; pip install {name}, or take it out")
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    distributed.refuse_other_sharding()
    check_choice("check", check, ("sample", "all"))
    output = Path(recipe.output)
    stamps = distributed.on_main(lambda: _prepare(recipe, output, check, records))
    results = []
    for number, stamp in enumerate(stamps):
        results.append(_run_stage(recipe, number, stamp, output, results, records, console))
    if _is_main():
        publish(results[-1].folder / "final", output / "final")
        console.print(f"finished: {output / 'final'}")
    distributed.barrier()  # before the questions, which take longer than others wait
    if _is_main() and recipe.heldout is not None:
        conclude(recipe, TrainResult(output, results), console)
    return TrainResult(output, results)


def _prepare(recipe: Recipe, output: Path, check: str, records: Any) -> list[dict[str, str | None]]:
    """Make the output folder and check what is still to run; returns the fingerprints of all stages."""
    content = Content()
    stamps = [fingerprint(recipe, number, content) for number in range(len(recipe.stages))]
    waiting = []
    for number, (stage, stamp) in enumerate(zip(recipe.stages, stamps, strict=True)):
        folder = output / stage.name
        if (folder / "final" / STAMP).is_file():
            check_stamp(folder / "final" / STAMP, stamp, folder)
            continue
        waiting.append(number)
        for whole in checkpoints(folder)[-1:]:
            check_stamp(whole / STAMP, stamp, folder)
    check_recipe(recipe, waiting, level=check, records=records)
    if recipe.heldout is not None:
        read_questions(recipe.heldout)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _sweep(output)
        _write_text(output / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    except (OSError, ValueError) as error:
        raise RecipeError(f"output: {output} cannot be made ({getattr(error, 'strerror', None) or error})") from None
    return stamps


def _is_main() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _write_text(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _sweep(folder: Path) -> None:
    """Remove what a kill left half-written."""
    for pattern in (".saving-*", ".final.*", ".adapter.*"):
        for half in folder.glob(pattern):
            shutil.rmtree(half, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Make `target` the same checkpoint as `source`; hard links where the file system has them."""
    if target.is_symlink():  # what earlier versions left; a copy of it would lead nowhere
        target.unlink()
    stamp = source / STAMP
    if (target / STAMP).is_file() and (target / STAMP).read_bytes() == stamp.read_bytes():
        return

    def link(src: str, dst: str) -> str:
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)
        return dst

    with atomic_folder(target) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True, copy_function=link)
        move_record(scratch, source, target)


def _run_stage(
    recipe: Recipe,
    number: int,
    stamp: dict[str, str | None],
    output: Path,
    done: list[StageResult],
    records: Any,
    console: Console,
) -> StageResult:
    stage = global_batch(recipe.stages[number], distributed.world_size())
    folder = output / stage.name
    if (folder / "final" / STAMP).is_file():
        metrics = read_json(folder / "metrics.json", kind=dict, finite=False)
        return StageResult(stage.name, folder, metrics, ran=False)
    if _is_main():
        folder.mkdir(exist_ok=True)
        _sweep(folder)
    distributed.barrier()
    start = done[-1].folder / "final" if done else None
    metrics = StageRun(recipe, stage, number, folder, start, records, console).run(stamp)
    return StageResult(stage.name, folder, metrics, ran=True)


class StageRun:
    """One stage from its start or its newest checkpoint to its `final`."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        number: int,
        folder: Path,
        start: Path | None,
        records: Any,
        console: Console,
    ) -> None:
        self.recipe, self.stage, self.number, self.folder = recipe, stage, number, folder
        self.start, self.records, self.console = start, records, console
        self.seed = recipe.stage_seed(number)
        whole = checkpoints(folder)
        self.resume = whole[-1] if whole else None

    def run(self, stamp: dict[str, str | None]) -> dict[str, Any]:
        """Train and write `final`; returns the metrics."""
        stage, world = self.stage, distributed.world_size()
        with named(self.number):
            objective = self.objective = objective_of(stage)
        base, processor = self._load()
        saved = (getattr(base, "config", None), processor)
        adapted = self._adapted(base, processor) if stage.lora is not None else None
        with named(self.number):
            objective.fit(base)
            objective.bind(saved[0], processor)
        set_seed(self.seed)
        with named(self.number):
            model = prepare(base, stage, getattr(processor, "tokenizer", None))
        samples = self._samples()
        counts = trainable_by_part(model)
        about = Run(
            recipe=self.recipe,
            stage=stage,
            seed=self.seed,
            folder=self.folder,
            cache=Path(self.recipe.output) / "cache",
            module=base,
            wrapped=model,
            processor=processor,
            samples=samples,
            start=self._start,
            console=self.console,
            world=world,
        )
        objective.begin(about)
        batches = self._batches(samples, world)
        recompute(model, stage.gradient_checkpointing)
        if stage.shard and world > 1:
            distributed.shard(model, bf16=stage.bf16)
        trainer = StageTrainer(
            model,
            training_arguments(self.recipe, stage, self.folder, self.seed, streams=isinstance(samples, StreamSamples)),
            stage=stage,
            objective=objective,
            samples=samples,
            batches=batches,
            collator=objective.collator(about),
            processor=processor,
            seed=self.seed,
            base=adapted,
        )
        trainer.stamp = stamp_text(stamp)
        if isinstance(batches, StreamBatches):
            plan = summary.StreamPlan(samples.stream.shards, stage.max_steps, stage.buffer)
        else:
            plan = summary.plan_of(samples, stage, batches, world, objective.flat)
        facts = {"stage": stage.name, "trainable": counts, "batches": len(batches), **summary.facts(plan)}
        metrics = Metrics(self.folder / "metrics.json", facts)
        trainer.add_callback(metrics)
        bar = Bar(stage.name, self.console)
        if _is_main():
            trainer.add_callback(bar)
            self.console.print("\n".join(summary.lines(stage, plan, counts, base)), highlight=False, soft_wrap=True)
            if world == 1 and self.recipe.heldout is not None and isinstance(base, LlavakitForConditionalGeneration):
                every = self.recipe.heldout.every or max(1, plan.steps // 5)
                questions = read_questions(self.recipe.heldout)
                trainer.add_callback(Samples(stage.name, questions, every, base, processor, self.console))
        gc.freeze()  # accelerate collects garbage at the start; what lives already need not be searched
        try:
            trainer.train(resume_from_checkpoint=str(self.resume) if self.resume else None)
        finally:
            gc.unfreeze()
            bar.close()
        if samples.bad and _is_main():
            metrics.facts["skipped"] = _report(samples, batches)
            self.console.print(metrics.facts["skipped"])
        values = metrics.write(trainer.state, finished=True)  # first, so that a finished stage always has them
        self._finish(trainer, saved, stamp)
        return values

    def _start(self) -> tuple[nn.Module, Any]:
        """What the stage starts from when nothing of it is done."""
        return self.objective.load(self.start) if self.start is not None else self.objective.build(self.recipe)

    def _adapted(self, model: LlavakitForConditionalGeneration, processor: LlavakitProcessor) -> Path:
        """Folder of the model that the stage's adapters belong to; written here if it is nowhere on disk."""
        if self.start is not None:
            return self.start
        if self.recipe.model is not None:
            folder = local_folder(self.recipe.model)
            if open_checkpoint(folder).config.text_config.vocab_size == model.config.text_config.vocab_size:
                return folder
        own = self.folder / "base"
        if _is_main() and not own.is_dir():
            save(model.state_dict(), model.config, processor, own)
        distributed.barrier()
        return own

    def _load(self) -> tuple[nn.Module, Any]:
        """The model to go on with; without LoRA a checkpoint of the stage holds all of it."""
        full = self.resume is not None and self.stage.lora is None
        model, processor = self.objective.load(self.resume) if full else self._start()
        if self.stage.dtype == "bfloat16":
            model.to(torch.bfloat16)
        model.train()
        return model, processor

    def _samples(self) -> PreparedSamples | StreamSamples:
        records = self.records
        if records is None:
            records = open_records(self.recipe, self.number, self.objective.read)
        options = {"on_bad_record": self.recipe.on_bad_record, "bad": BadRecords(self.folder / "skipped.jsonl")}
        if isinstance(records, RecordStream):
            return StreamSamples(records, self.objective, **options)
        return PreparedSamples(records, self.objective, seed=self.seed, **options)

    def _batches(self, samples: PreparedSamples | StreamSamples, world: int) -> list[list[int]] | StreamBatches:
        """All batches of this process, or where they are drawn from."""
        rank = _rank()
        if isinstance(samples, PreparedSamples):
            return plan_batches(samples, self.stage, self.seed, world=world, rank=rank)
        state = read_state(self.resume, rank) if self.resume is not None else None
        return StreamBatches(samples, self.stage, self.seed, world=world, rank=rank, state=state)

    def _finish(
        self, trainer: StageTrainer, saved: tuple[Any, LlavakitProcessor], stamp: dict[str, str | None]
    ) -> None:
        """Write `final` and remove the checkpoints that led to it."""
        config, processor = saved
        final = self.folder / "final"
        with clear_write_errors(final, "make room and start again; the stage's newest checkpoint is whole"):
            state = self._final_state(trainer, processor)
            if _is_main():
                with atomic_folder(final) as scratch:
                    if state is None:
                        shutil.copytree(self.folder / "adapter", scratch, dirs_exist_ok=True)
                    else:
                        self.objective.save(state, config, processor, scratch / "model")
                        for path in (scratch / "model").iterdir():
                            path.rename(scratch / path.name)
                        (scratch / "model").rmdir()
                    (scratch / STAMP).write_text(stamp_text(stamp), encoding="utf-8")
                for path in checkpoints(self.folder):
                    shutil.rmtree(path)
        distributed.barrier()

    def _final_state(self, trainer: StageTrainer, processor: LlavakitProcessor) -> Mapping[str, torch.Tensor] | None:
        """The finished weights; None if the adapter was not to be merged and is all there is."""
        state = distributed.full_state(trainer.model)
        lora = self.stage.lora
        if lora is None:
            return state
        if _is_main():
            with atomic_folder(self.folder / "adapter") as scratch:
                save_adapter(trainer.model, state, processor, scratch, trainer.base, self.folder / "adapter")
        if not lora.merge:
            return None
        whole = self._start()[0].state_dict() if lora.quantize else None
        return merged_state(trainer.model, state, whole)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _report(samples: PreparedSamples | StreamSamples, batches: Any) -> str:
    """Which records were left out, and how many samples others took the place of."""
    if isinstance(samples, StreamSamples):
        return samples.bad.report()
    dataset = samples.dataset
    report = dataset.bad.report()
    broken = {(error.file, error.line) for error in dataset.bad.errors()}
    if not broken:
        return report
    chosen = [index for batch in batches for index in batch]
    replaced = sum(dataset.place(index) in broken for index in chosen)
    share = 100 * replaced / max(len(chosen), 1)
    return f"{report}\n{replaced} of {len(chosen)} samples ({share:.1f} %) were others of the same source instead"


def training_arguments(
    recipe: Recipe, stage: Stage, folder: Path, seed: int, *, streams: bool = False
) -> TrainingArguments:
    """transformers' arguments of a stage.

    Args:
        streams: Whether it learns from a stream, whose length nobody knows.
    """
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # the planned batches are the whole stage
        max_steps=stage.max_steps if streams else -1,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=stage.learning_rate,
        **schedules.arguments(stage),
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        adam_epsilon=stage.epsilon,
        optim=stage.optimizer,
        max_grad_norm=stage.clip or 0.0,
        bf16=stage.bf16 and not (stage.shard and distributed.world_size() > 1),
        tf32=True if cuda else None,
        use_cpu=not cuda,
        seed=seed,
        data_seed=seed,
        save_strategy="steps" if stage.save_steps else "no",
        save_steps=stage.save_steps or 500,
        logging_steps=stage.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=recipe.report_to or "none",
        run_name=f"{recipe.run_name or Path(recipe.output).name}/{stage.name}",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=True if distributed.world_size() > 1 and not stage.shard else None,
    )
