"""The second claim, small: a judge that learned from written scores agrees with them on answers of a model that is new.

In the world of `miniature`, policies of different skill answer, and a teacher scores the answers from 0 to 99, with
noise. A small network sees input and answer and learns to write the teacher's score, one digit behind the other; what
it writes is read by LLaVA-Critic's own parser. Spec section 11 B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llavakit.systems.llava_critic.miniature import CHOICES, HIDDEN, SYMBOLS, WIDTH, Policy, World, weakly_trained
from llavakit.systems.llava_critic.verdicts import critic_score

SKILLS = (30, 150, 800)  # steps of the policies whose answers are scored in training
UNSEEN = 350  # of the one that is not among them, and starts from other weights
TEACHER = 8.0  # spread of the teacher's error, in points of 100
FEATURES, DIGITS = 16, 10


class Scorer(nn.Module):
    """Writes two digits about an answer to an input."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Sequential(
            nn.Linear(WIDTH, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, SYMBOLS * CHOICES * FEATURES)
        )
        self.weigh = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.Linear(FEATURES, FEATURES))
        self.digit = nn.Embedding(DIGITS + 1, FEATURES)  # the last stands for the begin
        self.write = nn.Sequential(nn.Linear(2 * FEATURES, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIGITS))

    def forward(self, inputs: Tensor, answers: Tensor, before: Tensor) -> Tensor:
        """Logits of the digit behind `before` [answers]; `answers` is [answers, symbols]."""
        seen = self.see(inputs).unflatten(-1, (SYMBOLS, CHOICES, FEATURES))
        own = seen.gather(2, answers[..., None, None].expand(-1, -1, 1, FEATURES))[:, :, 0]
        return self.write(torch.cat([self.weigh(own).sum(1), self.digit(before)], -1))

    @torch.no_grad()
    def judge(self, inputs: Tensor, answers: Tensor) -> list[str]:
        """What it writes about answers."""
        begin = torch.full((len(answers),), DIGITS)
        tens = self(inputs, answers, begin).argmax(-1)
        ones = self(inputs, answers, tens).argmax(-1)
        return [f"Score: {a}{b}" for a, b in zip(tens.tolist(), ones.tolist(), strict=True)]


def taught(world: World, inputs: Tensor, answers: Tensor, generator: torch.Generator) -> Tensor:
    """The teacher's scores [answers], 0 to 99."""
    true = 99 * (answers == world.ideal(inputs)).float().mean(-1)
    return (true + TEACHER * torch.randn(len(answers), generator=generator)).round().clamp(0, 99).long()


def answered(policy: Policy, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [count, 12] and an answer to each [count, symbols]."""
    inputs = torch.randn(count, WIDTH, generator=generator)
    return inputs, policy.sample(inputs, 1, generator)[:, 0]


def train(scorer: Scorer, world: World, policies: Sequence[Policy], steps: int, generator: torch.Generator) -> None:
    """On fresh answers of all policies in every step."""
    optimiser = torch.optim.AdamW(scorer.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        drawn = [answered(policy, 128, generator) for policy in policies]
        inputs, answers = (torch.cat(part) for part in zip(*drawn, strict=True))
        scores = taught(world, inputs, answers, generator)
        tens, ones = scores // 10, scores % 10
        begin = torch.full_like(tens, DIGITS)
        loss = F.cross_entropy(scorer(inputs, answers, begin), tens)
        loss = loss + F.cross_entropy(scorer(inputs, answers, tens), ones)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation; 0 for a judge that says the same of everything."""
    found = torch.corrcoef(torch.tensor([first, second], dtype=torch.float64))[0, 1]
    return 0.0 if found.isnan() else float(found)


def tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b; 0 for a judge that says the same of everything."""
    pair = (torch.tensor(own, dtype=torch.float64) for own in (first, second))
    signs = [(own[:, None] - own[None]).sign() for own in pair]
    ordered = [float(own.abs().sum()) for own in signs]
    return float((signs[0] * signs[1]).sum()) / (ordered[0] * ordered[1]) ** 0.5 if all(ordered) else 0.0


def agreement(seed: int, steps: int, count: int = 1000) -> dict[str, float]:
    """Agreement with the teacher of the trained and the untrained judge, on the policies of training and a new one."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(300 + seed)
    world = World(generator)
    policies = [weakly_trained(world, generator, skill) for skill in SKILLS]
    new = weakly_trained(world, generator, UNSEEN)
    untrained, judge = Scorer(), Scorer()
    train(judge, world, policies, steps, generator)
    known = [answered(policy, count // len(policies), generator) for policy in policies]
    tested = {"known": [torch.cat(part) for part in zip(*known, strict=True)], "new": answered(new, count, generator)}
    found = {}
    for whose, (inputs, answers) in tested.items():
        wanted = taught(world, inputs, answers, generator).tolist()
        for name, own in (("judge", judge), ("untrained", untrained)):
            said = [critic_score(text) or 0.0 for text in own.judge(inputs, answers)]
            found |= {f"{name} {whose}": pearson(said, wanted), f"{name} {whose} tau": tau(said, wanted)}
    return found
