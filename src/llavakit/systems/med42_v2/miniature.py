"""Med42-v2's claim, small: instruction tuning on a domain raises accuracy in it and ends refusals.

Facts are an entity and a relation with an answer of two tokens: 200 general ones and 200 clinical ones. The base model
knows all general facts and a third of the clinical ones, and was taught to refuse every clinical question. It is tuned
on clinical facts with general ones among them (or without), and then aligned by DPO, answers against refusals: in one
stage, or in three on thirds of the pairs, each against the stage before, or all against the tuned model.
Spec section 11.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llavakit.proof.miniature import Comparison, Verdict, run_seeds
from llavakit.training.objectives.preference import Pairs, pair_losses, sequence_logps

ENTITIES, RELATIONS, VALUES = 40, 10, 60
BEGIN, ASK, END, REFUSE = 0, 1, 2, (3, 4)
FIRST_ENTITY, FIRST_RELATION, FIRST_VALUE = 5, 5 + ENTITIES, 5 + ENTITIES + RELATIONS
PROMPT, KNOWN, MIX, BETA, BATCH = 4, 0.35, 0.265, 0.1, 64


class Facts:
    """All facts: prompts [facts, 4], answers [facts, 2], wrong options [facts, 3, 2], and which are clinical
    [facts]."""

    def __init__(self, generator: torch.Generator) -> None:
        entity, relation = torch.meshgrid(torch.arange(ENTITIES), torch.arange(RELATIONS), indexing="ij")
        entity, relation = entity.flatten() + FIRST_ENTITY, relation.flatten() + FIRST_RELATION
        count = len(entity)
        marks = [torch.full((count,), mark) for mark in (BEGIN, ASK)]
        self.prompts = torch.stack([marks[0], entity, relation, marks[1]], dim=1)
        self.answers = torch.randint(FIRST_VALUE, FIRST_VALUE + VALUES, (count, 2), generator=generator)
        self.clinical = relation >= FIRST_RELATION + RELATIONS // 2
        others = torch.randint(1, count, (count, 3), generator=generator) + torch.arange(count)[:, None]
        self.wrong = self.answers[others % count]
        self.refusals = torch.tensor(REFUSE).expand(count, 2)

    def rows(self, which: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and labels [rows, 7] of prompts with answers; the answer and its end are learned."""
        ids = torch.cat([self.prompts[which], answers, torch.full((len(which), 1), END)], dim=1)
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        return ids, labels


def new_model() -> LlamaForCausalLM:
    """Two layers of width 64."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=FIRST_VALUE + VALUES,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


def tune(model: Any, ids: Tensor, labels: Tensor, steps: int, rate: float, generator: torch.Generator) -> Any:
    """Next-token training on rows drawn at random."""
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(steps):
        some = torch.randint(0, len(ids), (BATCH,), generator=generator)
        loss = -sequence_logps(model(ids[some], use_cache=False).logits, labels[some], average=True).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def align(model: Any, reference: Any, facts: Facts, which: Tensor, epochs: int, generator: torch.Generator) -> Any:
    """DPO by RMSprop, answers against refusals."""
    optimiser = torch.optim.RMSprop(model.parameters(), 1e-4)
    for _ in range(epochs):
        for some in which[torch.randperm(len(which), generator=generator)].split(BATCH // 2):
            rows = [facts.rows(some, own[some]) for own in (facts.answers, facts.refusals)]
            ids, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
            with torch.no_grad():
                known = sequence_logps(reference(ids, use_cache=False).logits, labels).chunk(2)
            found = sequence_logps(model(ids, use_cache=False).logits, labels).chunk(2)
            optimiser.zero_grad()
            pair_losses(Pairs(*found, *known), beta=BETA)[0].mean().backward()
            optimiser.step()
    return model


@torch.no_grad()
def measured(model: Any, facts: Facts) -> dict[str, float]:
    """Four-option ranking of clinical and of general facts, and the probability of refusing clinical questions."""

    def logps(answers: Tensor) -> Tensor:
        ids, labels = facts.rows(torch.arange(len(answers)), answers)
        return sequence_logps(model(ids, use_cache=False).logits, labels)

    options = torch.stack([logps(own) for own in (facts.answers, *facts.wrong.unbind(1))], dim=1)
    right = (options[:, :1] > options[:, 1:]).all(-1).float()
    refusing = logps(facts.refusals).exp()
    return {
        "clinical": float(right[facts.clinical].mean()),
        "general": float(right[~facts.clinical].mean()),
        "refuse": float(refusing[facts.clinical].mean()),
    }


def one_seed(seed: int, steps: int = 500) -> dict[str, float]:
    """Every arm from the same base."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    facts = Facts(generator)
    clinical, general = (torch.where(own)[0] for own in (facts.clinical, ~facts.clinical))
    clinical = clinical[torch.randperm(len(clinical), generator=generator)]
    known = clinical[: int(KNOWN * len(clinical))]

    def rows(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        made = [facts.rows(which, answers[which]) for which, answers in parts]
        return tuple(torch.cat(own) for own in zip(*made, strict=True))

    taught = rows(
        (general, facts.answers), (known, facts.answers), (clinical, facts.refusals), (clinical, facts.refusals)
    )
    base = tune(new_model(), *taught, 2 * steps, 3e-3, generator)
    some = general[: int(len(clinical) * MIX / (1 - MIX))]
    mixes = {"mix": rows((clinical, facts.answers), (some, facts.answers)), "alone": rows((clinical, facts.answers))}
    models = {name: tune(copy.deepcopy(base), *own, steps // 4, 1e-3, generator) for name, own in mixes.items()}
    tuned, thirds = models["mix"], clinical.chunk(3)
    models |= {"base": base, "one": align(copy.deepcopy(tuned), tuned, facts, clinical, 3, generator)}
    for name in ("three", "fixed"):
        policy = copy.deepcopy(tuned)
        for third in thirds:
            reference = tuned if name == "fixed" else copy.deepcopy(policy)
            policy = align(policy, reference, facts, third, 3, generator)
        models[name] = policy
    return {
        f"{name} {metric}": value for name, model in models.items() for metric, value in measured(model, facts).items()
    }


def run(seeds: Sequence[int] = (0, 1, 2), progress: Callable[[str], None] | None = None, **budget: int) -> Verdict:
    """Every arm under every seed.

    Args:
        budget: Another number of steps, see `one_seed`.
    """
    found = run_seeds(functools.partial(one_seed, **budget), seeds, progress)

    def compare(metric: str, name: str, higher: bool, threshold: float) -> Comparison:
        return Comparison(
            metric=name,
            idea=found.arm(f"mix {metric}", "tuned, general facts among"),
            baseline=found.arm(f"base {metric}", "base"),
            threshold=threshold,
            higher_is_better=higher,
        )

    def mean(name: str) -> str:
        return f"{found.arm(name, name).mean:.2f}"

    return Verdict(
        system="med42-v2",
        claim="Instruction tuning on clinical data raises accuracy on clinical questions and ends refusals.",
        paper="average of seven medical benchmarks 64.4 to 67.3 (8B), 77.7 to 79.5 (70B)",
        comparisons=(
            compare("clinical", "clinical facts ranked right", True, 0.1),
            compare("refuse", "probability of refusing", False, 0.1),
        ),
        seeds=tuple(seeds),
        seconds=found.seconds,
        notes=f"Chance is 0.25. General facts: {mean('base general')} at first, {mean('mix general')} with general "
        f"facts among the clinical ones, {mean('alone general')} without. Preference "
        f"training after it: clinical ranking "
        f"{mean('mix clinical')} before, {mean('one clinical')} after one stage, {mean('three clinical')} after three "
        f"against the stage before, {mean('fixed clinical')} after three against the tuned model; general "
        f"{mean('one general')}, {mean('three general')}, {mean('fixed general')}; refusing {mean('mix refuse')}, "
        f"{mean('one refuse')}, {mean('three refuse')}, {mean('fixed refuse')}. The paper has no "
        "ablation of its stages.",
    )
