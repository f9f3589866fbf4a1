"""LLaVA-Critic's claim, small: rewards from judgements in both orders improve a policy by DPO, round after round.

An input of 12 numbers has an ideal answer of 6 symbols out of 8, each the argmax of a fixed random linear map; an
answer's true score is the share of right symbols. A weakly trained policy samples five answers to 1,500 inputs, a judge
compares them, DPO trains on the best against the worst, and the result is the next round's policy and reference. The
judge sees the true difference with noise and favours the answer that it is shown first. Arms: all ordered pairs, each
pair in one order, pairs at random. Whether a trained judge generalises is measured by `miniature_judge`. Spec section
11 A and B.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llavakit.evaluation.rewards import best_and_worst, ordered_pairs, pairwise_rewards
from llavakit.proof.miniature import Comparison, Verdict, run_seeds
from llavakit.training.objectives.preference import Pairs, pair_losses

WIDTH, SYMBOLS, CHOICES, HIDDEN = 12, 6, 8, 64
FAVOUR, NOISE = -0.35, 0.25  # what the judge adds to the advantage of the answer that is shown second
ANSWERS, ROUNDS, BATCH, BETA = 5, 3, 25, 0.1
ARMS = {"both": "both orders", "one": "one order", "random": "random pairs"}


class Policy(nn.Module):
    """A distribution over answers: independent symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, SYMBOLS * CHOICES))

    def forward(self, inputs: Tensor) -> Tensor:
        """Log-probabilities [inputs, symbols, choices]."""
        return self.net(inputs).unflatten(-1, (SYMBOLS, CHOICES)).log_softmax(-1)

    def logps(self, inputs: Tensor, answers: Tensor) -> Tensor:
        """Log-probability of one answer to each input [inputs]."""
        return self(inputs).gather(-1, answers[..., None])[..., 0].sum(-1)

    @torch.no_grad()
    def sample(self, inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Answers [inputs, count, symbols]."""
        chances = self(inputs).exp().flatten(0, 1)
        drawn = torch.multinomial(chances, count, replacement=True, generator=generator)
        return drawn.unflatten(0, (-1, SYMBOLS)).transpose(1, 2)


class World:
    """The map from inputs to ideal answers."""

    def __init__(self, generator: torch.Generator) -> None:
        self.map = torch.randn(WIDTH, SYMBOLS * CHOICES, generator=generator)

    def ideal(self, inputs: Tensor) -> Tensor:
        """[inputs, symbols]."""
        return (inputs @ self.map).unflatten(-1, (SYMBOLS, CHOICES)).argmax(-1)

    def score(self, inputs: Tensor, answers: Tensor) -> Tensor:
        """Share of right symbols [inputs, answers]."""
        return (answers == self.ideal(inputs)[:, None]).float().mean(-1)


def weakly_trained(world: World, generator: torch.Generator, steps: int = 150) -> Policy:
    """A policy after a little supervised training in which half of the labels are random."""
    policy = Policy()
    optimiser = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(steps):
        inputs = torch.randn(64, WIDTH, generator=generator)
        labels = world.ideal(inputs)
        noise = torch.randint(0, CHOICES, labels.shape, generator=generator)
        labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.5, noise, labels)
        loss = F.nll_loss(policy(inputs).flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return policy


def judged(scores: Tensor, arm: str, generator: torch.Generator) -> list[tuple[int, int]]:
    """Best and worst answer to every input [inputs, answers] by an arm's rewards; equal rewards give (0, 0)."""
    if arm == "random":
        places = torch.rand(scores.shape, generator=generator).argsort(-1)[:, :2]
        return [tuple(pair) for pair in places.tolist()]
    noise = NOISE * torch.randn(*scores.shape, ANSWERS, generator=generator)
    seen = (scores[:, None, :] - scores[:, :, None] + FAVOUR + noise).tolist()
    pairs = [(first, second) for first, second in ordered_pairs(ANSWERS) if arm == "both" or first < second]
    found = []
    for advantages in seen:
        known = [[0.0] * ANSWERS for _ in range(ANSWERS)]
        for first, second in pairs:
            known[first][second] = advantages[first][second]
        found.append(best_and_worst(pairwise_rewards(known)) or (0, 0))
    return found


def one_round(policy: Policy, world: World, arm: str, generator: torch.Generator, prompts: int) -> float:
    """Sample, judge, train; the mean true gap between chosen and rejected answers."""
    inputs = torch.randn(prompts, WIDTH, generator=generator)
    answers = policy.sample(inputs, ANSWERS, generator)
    scores = world.score(inputs, answers)
    best, worst = torch.tensor(judged(scores, arm, generator)).unbind(-1)
    row = torch.arange(prompts)
    chosen, rejected = answers[row, best], answers[row, worst]
    reference = copy.deepcopy(policy)
    optimiser = torch.optim.Adam(policy.parameters(), 1e-3)
    for some in torch.randperm(prompts, generator=generator).split(BATCH):
        with torch.no_grad():
            fixed = [reference.logps(inputs[some], own[some]) for own in (chosen, rejected)]
        losses, *_ = pair_losses(
            Pairs(*(policy.logps(inputs[some], own[some]) for own in (chosen, rejected)), *fixed), beta=BETA
        )
        optimiser.zero_grad()
        losses.mean().backward()
        optimiser.step()
    return float((scores[row, best] - scores[row, worst]).mean())


@torch.no_grad()
def quality(policy: Policy, world: World, seed: int, count: int = 2000) -> tuple[float, float]:
    """Mean true score of sampled answers, and of the likeliest one."""
    generator = torch.Generator().manual_seed(9_000 + seed)
    inputs = torch.randn(count, WIDTH, generator=generator)
    sampled = world.score(inputs, policy.sample(inputs, ANSWERS, generator))
    return float(sampled.mean()), float(world.score(inputs, policy(inputs).argmax(-1)[:, None]).mean())


def one_part(seed: int, part: str, prompts: int = 1500, steps: int = 800) -> dict[str, float]:
    """The judge's training ("judge"), or all arms of the policies from the same start ("policies")."""
    if part == "judge":
        from llavakit.systems.llava_critic.miniature_judge import agreement

        return agreement(seed, steps)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    world = World(generator)
    start = weakly_trained(world, generator)
    found = dict(zip(("start", "start greedy"), quality(start, world, seed), strict=True))
    for arm in ARMS:
        policy, draws = copy.deepcopy(start), torch.Generator().manual_seed(1_000 + seed)
        for number in range(1, ROUNDS + 1):
            gap = one_round(policy, world, arm, draws, prompts)
            sampled, greedy = quality(policy, world, seed)
            found |= {f"{arm} {number}": sampled, f"{arm} greedy {number}": greedy, f"{arm} gap {number}": gap}
    return found


def run(seeds: Sequence[int] = (0, 1, 2), progress: Callable[[str], None] | None = None, **budget: int) -> Verdict:
    """Three rounds of every arm under every seed.

    Args:
        budget: Other numbers of prompts a round and of the judge's steps, see `one_part`.
    """
    measured = run_seeds(functools.partial(one_part, **budget), seeds, progress, parts=("judge", "policies"))

    def compare(
        idea: str,
        baseline: str,
        names: tuple[str, str],
        threshold: float = 0.0,
        metric: str = "true score of sampled answers",
    ) -> Comparison:
        return Comparison(
            metric=metric,
            idea=measured.arm(idea, names[0]),
            baseline=measured.arm(baseline, names[1]),
            threshold=threshold,
        )

    last = f" {ROUNDS}"
    comparisons = [
        compare(f"both{last}", f"one{last}", ("both orders", "one order"), 0.02),
        compare(f"both{last}", f"random{last}", ("both orders", "random pairs"), 0.02),
        compare(f"one{last}", f"random{last}", ("one order", "random pairs")),
        compare("both 1", "start", ("both orders, round 1", "start")),
        *(
            compare(f"both {n}", f"both {n - 1}", (f"both orders, round {n}", f"round {n - 1}"))
            for n in range(2, ROUNDS + 1)
        ),
        compare(
            "judge new", "untrained new", ("trained judge", "untrained"), 0.5, "Pearson's r, answers of a new model"
        ),
        compare("judge new", "judge known", ("a new model", "models of training"), -0.1, "Pearson's r, trained judge"),
    ]
    taus = [measured.arm(f"{name} new tau", name).mean for name in ("judge", "untrained")]
    greedy = [measured.arm(name, name).mean for name in ("start greedy", f"both greedy{last}")]
    gaps = ", ".join(f"{ARMS[arm]} {measured.arm(f'{arm} gap 1', arm).mean:.2f}" for arm in ARMS)
    return Verdict(
        system="llava-critic",
        claim="Rewards from a judge that sees every pair in both orders improve a policy, more than one order does; "
        "and a judge that learned from scores agrees with them on answers of a new model.",
        paper="LLaVA-W 90.7 to 100.3, WildVision 54.0 to 67.3 after three rounds with Critic-7B; Pearson's r with "
        "GPT-4o 0.364 before training as a critic, 0.732 after it",
        comparisons=tuple(comparisons),
        seeds=tuple(seeds),
        seconds=measured.seconds,
        notes=f"Chance is {1 / CHOICES:.3f}. The likeliest answer's score went from {greedy[0]:.2f} to {greedy[1]:.2f} "
        f"with both orders. True gap of chosen and rejected answers in round 1: {gaps}. Kendall's tau-b on answers of "
        f"a new model: trained judge {taus[0]:.2f}, untrained {taus[1]:.2f}.",
    )
