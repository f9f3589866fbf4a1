"""LLaVA-NeXT-Interleave's claim, small: training on both placements answers under both.

Three pictures, each three noisy copies of one of five prototypes, are introduced by a letter each; the question is one
of the letters, the answer the class of its picture. Interleaved, a picture stands behind its letter; in front, all
pictures come first and a mark stands behind each letter (both layouts are made by the record edit `media_in_front`). A
small causal transformer learns from one layout, from the other, or from both in turn, and is tested on both. Spec
section 11.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.conversation.messages import is_media, split_literals
from llavakit.data.edits import MediaInFront
from llavakit.proof.miniature import Comparison, Measurements, Verdict
from llavakit.proof.parallel import run_each

PICTURES, COPIES, CLASSES, LETTERS = 3, 3, 5, 6
FEATURES, WIDTH, NOISE = 24, 48, 0.6
LONGEST = PICTURES * (COPIES + 2) + 1  # tokens of a prompt with its question
MARK = LETTERS  # id of the mark behind a letter whose picture stands in front; ids below are letters
INTERLEAVED, IN_FRONT = "interleaved", "in front"
PICTURE = -1  # in a layout: a picture; -2 - n stands for the n-th letter
ARMS = {"interleaved": (INTERLEAVED,), "in front": (IN_FRONT,), "mixed": (INTERLEAVED, IN_FRONT)}  # layouts in turn


@functools.cache
def layout(placement: str) -> tuple[int, ...]:
    """What stands where in a prompt without its question: letters, pictures, marks."""
    text = "".join(f"{number}<image>" for number in range(PICTURES))
    messages = [{"role": "user", "content": split_literals(text)}]
    if placement == IN_FRONT:
        messages = MediaInFront(mark="#")(messages)
    found: list[int] = []
    for part in messages[0]["content"]:
        found += [PICTURE] if is_media(part) else [MARK if c == "#" else -2 - int(c) for c in part["text"]]
    return tuple(found)


def draw(count: int, prototypes: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Letters [count, pictures], pictures [count, pictures, copies, features], questions [count], answers [count]."""
    letters = torch.rand(count, LETTERS, generator=generator).argsort(dim=1)[:, :PICTURES]
    classes = torch.randint(0, CLASSES, (count, PICTURES), generator=generator)
    seen = prototypes[classes][:, :, None].expand(-1, -1, COPIES, -1)
    seen = seen + NOISE * torch.randn(seen.shape, generator=generator)
    asked = torch.randint(0, PICTURES, (count, 1), generator=generator)
    return letters, seen, letters.gather(1, asked)[:, 0], classes.gather(1, asked)[:, 0]


class Reader(nn.Module):
    """The connector and a causal transformer of three layers, which says a class at the question."""

    def __init__(self) -> None:
        super().__init__()
        self.connector = MLP(vision_width=FEATURES, hidden_size=WIDTH)
        self.words = nn.Embedding(LETTERS + 1, WIDTH)
        self.places = nn.Parameter(torch.randn(LONGEST, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, letters: Tensor, seen: Tensor, questions: Tensor, placement: str) -> Tensor:
        """Class scores [prompts, classes]."""
        count, pictures = letters.shape
        grids = [(1, 1, COPIES)] * (count * pictures)
        tokens = self.connector(Features(seen.flatten(0, 2), grids, list(range(len(grids)))), []).values
        views = iter(tokens.view(count, pictures, COPIES, WIDTH).unbind(1))
        words, mark = self.words(letters), self.words.weight[MARK].expand(count, 1, WIDTH)
        pieces = {PICTURE: lambda _: next(views), MARK: lambda _: mark}
        stretches = [pieces.get(what, lambda n: words[:, -2 - n][:, None])(what) for what in layout(placement)]
        stretches.append(self.words(questions)[:, None])
        hidden = torch.cat(stretches, dim=1)
        length = hidden.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.layers(hidden + self.places[:length], mask=mask, is_causal=True)[:, -1])


def one_arm(arm: str, seed: int, steps: int, held_out: int, batch: int = 64) -> dict[str, float]:
    """Train one arm; accuracy under both placements."""
    torch.manual_seed(seed)
    model, generator = Reader(), torch.Generator().manual_seed(100 + seed)
    prototypes = F.normalize(torch.randn(CLASSES, FEATURES, generator=generator), dim=-1) * FEATURES**0.5 / 2
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        placement = ARMS[arm][step % len(ARMS[arm])]
        letters, seen, questions, answers = draw(batch, prototypes, generator)
        loss = F.cross_entropy(model(letters, seen, questions, placement), answers)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return {
        f"{arm}: {placement}": accuracy(model, placement, prototypes, seed, held_out)
        for placement in (INTERLEAVED, IN_FRONT)
    }


@torch.no_grad()
def accuracy(model: Reader, placement: str, prototypes: Tensor, seed: int, held_out: int) -> float:
    """Fraction of right answers to fresh questions."""
    model.eval()
    drawn = draw(held_out, prototypes, torch.Generator().manual_seed(9_000 + seed))
    return float((model(*drawn[:3], placement).argmax(-1) == drawn[3]).float().mean())


def one_run(run: tuple[int, str], steps: int = 1000, held_out: int = 2000) -> dict[str, float]:
    """One arm under one seed."""
    seed, arm = run
    return one_arm(arm, seed, steps, held_out)


def measure(
    seeds: Sequence[int], progress: Callable[[str], None] | None = None, workers: int | None = None, **budget: int
) -> Measurements:
    """Every arm under every seed, each in a process of its own, so that two cores share three seeds evenly."""
    started = time.perf_counter()
    runs = [(seed, arm) for seed in seeds for arm in ARMS]
    values: dict[str, dict[int, float]] = {}
    for number, metrics in run_each(functools.partial(one_run, **budget), runs, workers, name="run"):
        seed, arm = runs[number]
        for name, value in metrics.items():
            values.setdefault(name, {})[seed] = value
        if progress is not None:
            shown = ", ".join(f"{name.partition(': ')[2]} {value:.4g}" for name, value in metrics.items())
            progress(f"seed {seed}, trained {arm}: {shown}")
    found = {name: [own[seed] for seed in seeds] for name, own in values.items()}
    return Measurements(tuple(seeds), found, time.perf_counter() - started)


def run(seeds: Sequence[int] = (0, 1, 2), progress: Callable[[str], None] | None = None, **budget: int) -> Verdict:
    """Train every arm under every seed.

    Args:
        budget: Other numbers of steps, of held-out questions and of workers, see `measure`.
    """
    measured = measure(seeds, progress, **budget)

    def compare(idea: str, baseline: str, placement: str, threshold: float) -> Comparison:
        return Comparison(
            metric=f"accuracy, pictures {placement}",
            idea=measured.arm(f"{idea}: {placement}", f"trained {idea}"),
            baseline=measured.arm(f"{baseline}: {placement}", f"trained {baseline}"),
            threshold=threshold,
        )

    return Verdict(
        system="llava-next-interleave",
        claim="Training on both placements answers under both, and loses nothing where one alone was trained.",
        paper="mixed-format training improves results under both test formats over either alone (ablation)",
        comparisons=(
            compare("mixed", "interleaved", INTERLEAVED, -0.02),
            compare("mixed", "in front", IN_FRONT, 0.10),
            compare("mixed", "interleaved", IN_FRONT, 0.10),
        ),
        seeds=tuple(seeds),
        seconds=measured.seconds,
        notes="Chance is 0.2, guessing one of the pictures shown about 0.47.",
    )
