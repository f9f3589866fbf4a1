"""A recipe that fits a model and a number of records."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llavakit.errors import UserError
from llavakit.registry import OBJECTIVES
from llavakit.system import System, get_system
from llavakit.training.recipe import load_recipe, parse_recipe, read_yaml

DEFAULT = "llava-hf/llava-1.5-7b-hf"
STEPS = 300  # that a small set makes
MOST_EPOCHS = 30
BATCH, SMALL_BATCH, SMALL = 8, 4, 64  # records up to which a batch is small
FULL = 300_000_000  # parameters up to which all of the language model trains
CACHED = 5000  # records up to which features of the frozen encoder are kept on disk
# Adam's best rate falls about inversely with the width (Yang et al., arXiv 2203.03466); LLaVA-1.5's two rates at 4,096.
WIDTH, RATE, LORA_RATE, MOST_RATE = 4096, 2e-5, 2e-4, 1e-3


@dataclass
class Fit:
    """What a recipe is fitted to.

    Attributes:
        model: Checkpoint to start from.
        parts: What trains in full.
        width: Of the language model.
        lora: Rank of adapters on the language model; None trains all of it.
        large: Whether memory is worth saving.
        said: What was assumed, in words.
    """

    model: str
    parts: list[str]
    width: int = WIDTH
    lora: int | None = 64
    large: bool = True
    said: list[str] = field(default_factory=list)


def fit_to(system: str | None, model: str | None) -> Fit:
    """Look at the model that training will start from; what is not on this disk is not fetched.

    Raises:
        UserError: If there is no such system or model, or it takes no pictures.
    """
    card = get_system(system) if system is not None else None
    if model is None and card is not None:
        if not card.checkpoints:
            raise UserError(f"--system {system}: has no published weights to start from; name some with --model")
        _takes_pictures(card)
        model = card.checkpoints[0]
    said = [] if model is not None else [f"no --model was given, so it is {DEFAULT}"]
    model = model or DEFAULT
    if not Path(model).expanduser().exists() and model.count("/") == 1 and not model.startswith((".", "~", "/")):
        said.append(f"{model} is not on this disk, so it is taken for a model of about 7 billion parameters")
        return Fit(model, ["multi_modal_projector"], said=said)
    from llavakit.checkpoints.opening import open_checkpoint, skeleton

    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    if "image" not in config.media:
        raise UserError(f"{model}: takes no pictures; name a model with a vision side")
    if system is not None and config.system is not None and config.system != system:
        raise UserError(f"--system {system}: {model} belongs to {config.system}; leave one of the two out")
    net = skeleton(checkpoint)
    size = sum(parameter.numel() for parameter in net.model.language_model.parameters())
    width = config.text_config.hidden_size
    parts = ["multi_modal_projector"]
    if size > FULL:
        said.append(f"the language model has {size:,} parameters, so adapters (LoRA, rank 64) train on it")
        return Fit(str(Path(model).resolve()), parts, width, said=said)
    parts += ["language_model"] + ([] if config.tie_word_embeddings else ["lm_head"])
    if config.language_adapter:
        parts.append("language_adapter")
    said.append(f"the language model has {size:,} parameters, so all of it trains; the vision encoder stays as it is")
    return Fit(str(Path(model).resolve()), parts, width, lora=None, large=False, said=said)


def _takes_pictures(card: System) -> None:
    """Refuse a system whose published recipe trains no model that answers about pictures."""
    if card.recipe is None:
        return
    recipe = load_recipe(card.recipe)
    media = recipe.parts.media if recipe.parts is not None else None
    family = OBJECTIVES.get(recipe.stages[-1].objective.type).family
    if family != "model" or (media is not None and "image" not in media):
        raise UserError(f"--system {card.slug}: does not answer about pictures; `llavakit systems` lists what does")


def steps_of(records: int) -> tuple[int, int, int]:
    """Batch size, epochs and steps for so many records."""
    batch = BATCH if records > SMALL else min(SMALL_BATCH, records)
    steps = -(-records // batch)
    epochs = min(MOST_EPOCHS, max(1, math.ceil(STEPS / steps)))
    return batch, epochs, steps * epochs


def recipe_text(fit: Fit, out: Path, images: Path, task: str, records: int, commands: list[str]) -> str:
    """The recipe as YAML with its reasons beside it.

    Args:
        out: The project's folder.
        images: Folder of the pictures.
        task: Benchmark of the held-out questions.
        records: To learn from.
        commands: What its head shows.
    """
    batch, epochs, steps = steps_of(records)
    rate = LORA_RATE if fit.lora else RATE
    rate = min(rate * WIDTH / fit.width, MOST_RATE)
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    head = "\n".join(f"#   {command}" for command in commands)
    lines = [
        f"# Made by `llavakit new`. Every key is explained in docs/recipes.md.\n#\n{head}\n",
        f"model: {_scalar(fit.model)}\n",
        "data:",
        f"  - path: {_scalar(str(out / 'train.jsonl'))}",
        f"    images: {_scalar(str(images))}\n",
        "stages:",
        "  - name: tune",
        f"    train: [{', '.join(fit.parts)}]",
    ]
    if fit.lora:
        lines.append(f"    lora: {{rank: {fit.lora}, alpha: {2 * fit.lora}}}   # on the language model")
    lines += [
        f"    learning_rate: {rate:.1e}",
        f"    epochs: {epochs}   # {records:,} records in batches of {batch}: about {steps:,} steps",
        f"    batch_size: {batch}",
        "    warmup: 0.03",
        "    schedule: cosine",
        "    clip: 1.0",
    ]
    if epochs > 1 and records <= CACHED:
        lines.append("    cache_features: true   # the encoder is frozen: its features are computed once")
    if fit.large:
        lines.append("    gradient_checkpointing: true")
        lines.append("    dtype: bfloat16")
    if bf16:
        lines.append("    bf16: true")
    lines += [
        f"    save_steps: {max(20, steps // 5)}   # after an interrupt the same command goes on from here",
        f"    log_steps: {max(1, min(10, steps // 50))}\n",
        "heldout:   # asked while it trains and at the end, beside the model before training and without pictures",
        f"  questions: {_scalar(str(out / 'heldout.jsonl'))}",
        f"  images: {_scalar(str(images))}",
        f"  task: {task}\n",
        f"output: {_scalar(str(out / 'run'))}\n",
    ]
    text = "\n".join(lines)
    parse_recipe(read_yaml(text, "recipe"))
    return text


def _scalar(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
