"""Surgical-LLaVA's claim about pooling, small: averages per frame and per patch together keep what each alone loses.

A clip is a map of features, 8 frames x 16 patches x 24 channels. The code of one of four organs lies at one of four
patches in every frame; the code of a first tool is added everywhere up to a random cut, that of another tool after it.
Four arms see the clip as the tokens of the product's own pooling: both kinds, those of frames alone, those of patches
alone, or the mean of everything in one token. Each has one linear projection and a one-layer transformer with a query
per question: at which patch the organ lies, which tool came first, which came last. Spec section 11.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llavakit.proof.miniature import Comparison, Verdict, run_seeds
from llavakit.systems.surgical_llava.connector import pool

FRAMES, PATCHES, CHANNELS, WIDTH = 8, 16, 24, 32
PLACES, TOOLS = (1, 6, 9, 14), 4
QUESTIONS = ("place", "first", "last")
ARMS = ("both", "frames", "patches", "mean")
NAMES = {
    "both": "per frame and per patch",
    "frames": "per frame alone",
    "patches": "per patch alone",
    "mean": "one mean of everything",
}


def codes(seed: int) -> tuple[Tensor, Tensor]:
    """Codes of the organ [channels] and of the tools [tools, channels]."""
    drawn = torch.randn(1 + TOOLS, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return drawn[0] * 2, drawn[1:]


def draw(count: int, seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips [count, frames, patches, channels] and the answers to the three questions [count, 3]."""
    organ, tools = codes(seed)
    clips = 0.3 * torch.randn(count, FRAMES, PATCHES, CHANNELS, generator=generator)
    place = torch.randint(0, len(PLACES), (count,), generator=generator)
    clips[torch.arange(count), :, torch.tensor(PLACES)[place]] += organ
    first = torch.randint(0, TOOLS, (count,), generator=generator)
    last = (first + torch.randint(1, TOOLS, (count,), generator=generator)) % TOOLS
    cut = torch.randint(2, FRAMES - 1, (count, 1), generator=generator)
    before = (torch.arange(FRAMES) < cut)[:, :, None]
    clips += torch.where(before, tools[first][:, None], tools[last][:, None])[:, :, None]
    return clips, torch.stack([place, first, last], dim=1)


def tokens_of(clips: Tensor, arm: str) -> Tensor:
    """Tokens [clips, tokens, channels] that an arm sees."""
    if arm == "mean":
        return clips.mean((1, 2))[:, None]
    pooled = torch.stack([pool(clip, None) for clip in clips])
    return {"both": pooled, "frames": pooled[:, :FRAMES], "patches": pooled[:, FRAMES:]}[arm]


class Reader(nn.Module):
    """Projection, positions, one transformer layer, a query and a head for each question."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.projection = nn.Linear(CHANNELS, WIDTH)
        self.positions = nn.Parameter(torch.randn(tokens, WIDTH) * 0.1)
        self.queries = nn.Parameter(torch.randn(len(QUESTIONS), WIDTH) * 0.1)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 4) for _ in QUESTIONS])

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Scores [clips, 4] for every question."""
        seen = self.projection(tokens) + self.positions
        rows = torch.cat([seen, self.queries.expand(len(tokens), -1, -1)], dim=1)
        rows = self.layer(rows)[:, -len(QUESTIONS) :]
        return [head(row) for head, row in zip(self.heads, rows.unbind(1), strict=True)]


def one_arm(arm: str, seed: int, steps: int, clips: int, held_out: int, batch: int = 32) -> dict[str, float]:
    """Train one arm; the share of right answers to each question on fresh clips."""
    data = torch.Generator().manual_seed(100 + seed)
    seen, answers = draw(clips, seed, data)
    fresh, wanted = draw(held_out, seed, data)
    seen, fresh = tokens_of(seen, arm), tokens_of(fresh, arm)
    torch.manual_seed(seed)
    model = Reader(seen.shape[1])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, clips, (batch,))
        scores = model(seen[rows])
        loss = sum(F.cross_entropy(score, answers[rows, n]) for n, score in enumerate(scores))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        guesses = torch.stack([score.argmax(-1) for score in model(fresh)], dim=1)
    right = (guesses == wanted).float().mean(0).tolist()
    return {f"{arm} {question}": value for question, value in zip(QUESTIONS, right, strict=True)}


# The learning rate was chosen on seeds 0 to 3, so the verdict is measured on others.
SEEDS = (10, 11, 12, 13)


def one_seed(seed: int, steps: int = 500, clips: int = 900, held_out: int = 600) -> dict[str, float]:
    """All arms under one seed."""
    results: dict[str, float] = {}
    for arm in ARMS:
        results |= one_arm(arm, seed, steps, clips, held_out)
    return results


def run(seeds: Sequence[int] = SEEDS, progress: Callable[[str], None] | None = None, **budget: int) -> Verdict:
    """Train every arm under every seed.

    Args:
        budget: Other numbers of steps, clips and held-out clips, see `one_seed`.
    """
    measured = run_seeds(functools.partial(one_seed, **budget), seeds, progress)

    def compare(baseline: str, question: str, threshold: float = 0.0) -> Comparison:
        said = {"place": "where the organ lies", "first": "first tool", "last": "last tool"}[question]
        return Comparison(
            metric=f"accuracy, {said}",
            idea=measured.arm(f"both {question}", NAMES["both"]),
            baseline=measured.arm(f"{baseline} {question}", NAMES[baseline]),
            threshold=threshold,
        )

    return Verdict(
        system="surgical-llava",
        claim="Averages per frame and per patch together keep place and order; each kind alone loses one of them.",
        paper="temporal and spatial averages, 356 tokens for 100 frames; no ablation is published",
        comparisons=(
            compare("frames", "place", 0.2),
            compare("patches", "first", 0.2),
            compare("patches", "last", 0.2),
            compare("mean", "place", 0.2),
            compare("mean", "first", 0.2),
            compare("mean", "last", 0.2),
            compare("frames", "first", -0.02),
            compare("patches", "place", -0.02),
        ),
        seeds=tuple(seeds),
        seconds=measured.seconds,
        notes="Chance is 0.25. Gains of at least 0.2 are needed where the baseline cannot know; where it can, at most "
        "0.02 may be lost. That domain dialogues teach what general ones do not is not re-tested here.",
    )
