"""The claim in small: dropping 80 % of the image tokens is free if it is learned, and ruinous at random.

An image of 15 cells, three of which carry a coloured shape; the question names a shape, the answer is its colour. A
tiny decoder first learns with all cells. From there two ways of keeping exactly three cells are tuned with the same
budget: the adapter as it is published, and the same adapter keeping three cells at random. The decision is taken
before layer 0: behind two layers that have read the marks already, dropping anything would be free in a world so
small (spec section 11).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from llavakit.proof.cost import count
from llavakit.proof.miniature import Comparison, Verdict, run_seeds
from llavakit.systems.dynamic_llava.adapter import DynamicSparsification, Places
from llavakit.systems.dynamic_llava.decisions import top_keep

CELLS, MARKS, SHAPES, COLOURS = 15, 3, 7, 6
AMPLITUDE = 2.0
WIDTH = 32
RATE = 0.2
BATCH, FRESH = 64, 2000
FULL_STEPS, TUNING_STEPS = 500, 300
SEEDS = (0, 1, 2)


class RandomDropping(DynamicSparsification):
    """Keeps as many image tokens as the published adapter, but any."""

    def _image_logits(self, hidden: Tensor, places: list[Places]) -> list[Tensor]:
        return list(torch.randn(len(places), CELLS, 2))

    def _sampled(self, role: str, logits: Tensor, places: list[Places], shortest: int) -> list[Tensor]:
        kept = top_keep(logits.view(len(places), CELLS, 2), self.vision_keep_rate)
        return list(torch.zeros(len(places), CELLS).scatter_(1, kept, 1.0))


class Model(nn.Module):
    """Cells and question to colour, with or without an adapter around the decoder."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=8,
            bos_token_id=None,
            eos_token_id=None,
            max_position_embeddings=CELLS + 1,
            attn_implementation="sdpa",
        )
        self.cells = nn.Linear(SHAPES + COLOURS, WIDTH)
        self.question = nn.Embedding(SHAPES, WIDTH)
        self.decoder = LlamaModel(config)
        self.head = nn.Linear(WIDTH, COLOURS)
        self.adapter: DynamicSparsification | None = None

    def sparsified(self, kind: type[DynamicSparsification]) -> Model:
        """A copy with an adapter."""
        model = copy.deepcopy(self)
        model.adapter = kind(
            model.decoder.config,
            sparse_layer=0,
            vision_keep_rate=RATE,
            use_text_predictor=False,
            d_model=16,
            nhead=2,
            dim_feedforward=32,
            num_layers=1,
            mask_loss_weight=10.0,
        )
        return model

    def forward(self, cells: Tensor, question: Tensor) -> tuple[Tensor, Tensor | float]:
        """Logits of colours [batch, COLOURS] and the adapter's loss."""
        embeds = torch.cat([self.cells(cells), self.question(question)[:, None]], dim=1)
        if self.adapter is None:
            output = self.decoder(inputs_embeds=embeds, use_cache=False)
            return self.head(output.last_hidden_state[:, -1]), 0.0
        output, loss = self.adapter(
            self.decoder,
            inputs_embeds=embeds,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            visual=(torch.arange(CELLS + 1) < CELLS).expand(len(cells), -1),
            input_ids=None,
            labels=None,
            segments=None,
            use_cache=False,
        )
        return self.head(output.last_hidden_state[:, -1]), 0.0 if loss is None else loss


def world(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells [number, CELLS, features], questions, answers, and where the marks are [number, CELLS]."""
    cells = torch.randn(number, CELLS, SHAPES + COLOURS, generator=generator) * 0.3
    places = torch.rand(number, CELLS, generator=generator).argsort(-1)[:, :MARKS]
    shapes = torch.rand(number, SHAPES, generator=generator).argsort(-1)[:, :MARKS]
    colours = torch.randint(COLOURS, (number, MARKS), generator=generator)
    marks = torch.cat([F.one_hot(shapes, SHAPES), F.one_hot(colours, COLOURS)], dim=-1) * AMPLITUDE
    cells.scatter_add_(1, places[..., None].expand_as(marks), marks)
    asked = torch.randint(MARKS, (number, 1), generator=generator)
    where = torch.zeros(number, CELLS, dtype=torch.bool).scatter_(1, places, True)
    return cells, shapes.gather(1, asked)[:, 0], colours.gather(1, asked)[:, 0], where


def train(model: Model, steps: int, rate: float, generator: torch.Generator, adapter_rate: float = 4e-3) -> Model:
    """Train by AdamW with a one-cycle schedule."""
    model.train()
    own = [p for name, p in model.named_parameters() if not name.startswith("adapter.")]
    groups = [{"params": own}]
    rates = [rate]
    if model.adapter is not None:
        groups.append({"params": list(model.adapter.parameters())})
        rates.append(adapter_rate)
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    for step in range(steps):
        if model.adapter is not None:
            model.adapter.set_progress(step / steps)
        cells, question, answer, _ = world(BATCH, generator)
        logits, extra = model(cells, question)
        optimizer.zero_grad()
        (F.cross_entropy(logits, answer) + extra).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Model, generator: torch.Generator) -> float:
    """Fraction of right answers on fresh samples."""
    cells, question, answer, _ = world(FRESH, generator)
    return float((model(cells, question)[0].argmax(-1) == answer).float().mean())


@torch.no_grad()
def marks_kept(model: Model, generator: torch.Generator) -> float:
    """Fraction of the marks among the cells that a model keeps."""
    cells, _, _, where = world(FRESH, generator)
    kept = top_keep(model.adapter.image_predictor(model.cells(cells)), RATE)
    return float(where.gather(1, kept).float().sum() / where.sum())


def flops(model: Model) -> int:
    """FLOPs of one prefill."""
    cells, question, _, _ = world(1, torch.Generator().manual_seed(0))
    return count(lambda: model(cells, question)).total


def one_seed(seed: int) -> dict[str, float]:
    """All arms under one seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    full = train(Model(), FULL_STEPS, 4e-3, generator)
    learned = train(full.sparsified(DynamicSparsification), TUNING_STEPS, 2e-3, generator)
    random = train(full.sparsified(RandomDropping), TUNING_STEPS, 2e-3, generator)
    return {
        "full": accuracy(full, generator),
        "learned": accuracy(learned, generator),
        "random": accuracy(random, generator),
        "marks kept": marks_kept(learned, generator),
        "decoder FLOPs": flops(learned) / flops(full),
    }


def run(seeds: tuple[int, ...] | None = None, progress: Callable[[str], None] | None = None) -> Verdict:
    """Run all seeds and judge."""
    measured = run_seeds(one_seed, seeds or SEEDS, progress)
    learned = measured.arm("learned", "learned dropping, 3 of 15 cells")
    return Verdict(
        system="dynamic-llava",
        claim="learned dropping of 80 % of the image tokens costs nothing, random dropping costs the answer",
        paper="VQAv2 78.5 with 576 image tokens, 78.0 with 115 chosen ones (7B)",
        comparisons=(
            Comparison(metric="accuracy", idea=learned, baseline=measured.arm("full", "all 15 cells"), threshold=-0.02),
            Comparison(
                metric="accuracy",
                idea=learned,
                baseline=measured.arm("random", "random dropping, tuned"),
                threshold=0.5,
            ),
        ),
        seeds=measured.seeds,
        seconds=measured.seconds,
        notes=(
            f"{MARKS} marks among {CELLS} cells, decided before layer 0, {FULL_STEPS} + {TUNING_STEPS} steps; marks "
            f"kept by learning: {measured.arm('marks kept').mean:.3f}; decoder FLOPs left: "
            f"{measured.arm('decoder FLOPs').mean:.3f}; chance {1 / COLOURS:.3f}, and at most "
            f"{RATE + (1 - RATE) / COLOURS:.3f} when cells are kept blindly"
        ),
    )
