"""Med42-v2's golden components: template, labels, chunks, losses, likelihood ranking, ratings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llavakit.conversation.messages import normalise
from llavakit.conversation.template import PLACEHOLDER, get_template
from llavakit.data.collate import Collator
from llavakit.data.packing import chunks
from llavakit.evaluation.benchmarks.likelihood import first_best, ranking_values, shares
from llavakit.evaluation.metrics.elo import bradley_terry, online_elo, win_rates
from llavakit.proof.entries import text_processor, training_sample
from llavakit.proof.golden import Case, Example, Result, examples, take
from llavakit.proof.id_tokenizer import IdTokenizer
from llavakit.splice.scatter import IGNORE
from llavakit.training.objectives.preference import Pairs, pair_losses, sequence_logps, targets_of, token_logps

TEMPLATE = replace(get_template("med42_v2"), system="")  # the messages of a case are complete
BREAK = "\n\n"
START, HEAD_START, HEAD_END, TURN_END = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


# Text


def chat_prompt(case: Case) -> Iterator[Example | Result]:
    """Prompts in Llama-3's format; the template of the case is what it should say."""
    case.informational("config.*")

    def written(query: Mapping[str, Any]) -> str:
        query = take(query)
        messages = query.pop("messages")
        return TEMPLATE.render(normalise(messages), typed=PLACEHOLDER, **query)[0]  # here a mark is nothing but text

    yield from examples(written, case.inputs["cases"])


def sft_labels(case: Case) -> list[Example]:
    """Labels of conversations, from their messages."""
    inputs = take(case.inputs)
    sequences = inputs["sequences"]
    marks = {HEAD_START: inputs["start_header"], HEAD_END: inputs["end_header"], TURN_END: inputs["eot"]}
    # what opens a sequence, follows a header, and names the other roles is read off the sequences
    named = {"assistant": inputs["assistant"], **marks}
    first = next((s for s in sequences if s and s[0] != marks[HEAD_START]), None)
    if first is not None:
        named[START] = first[0]
    heads = marks[HEAD_START], marks[HEAD_END]
    breaks = Counter(s[n + 1] for s in sequences for n, i in enumerate(s[:-1]) if i == heads[1])
    if breaks:
        named[BREAK] = breaks.most_common(1)[0][0]
    named |= _roles(sequences, *heads, named["assistant"])
    known = IdTokenizer(named, sequences, START, TURN_END)
    processor = text_processor(known.tokenizer, TEMPLATE)

    def labelled(sequence: Sequence[int]) -> list[int]:
        # the product makes sequences of messages: what no message says, a beginning without a header and a header that
        # is cut off, is put around them
        begun = next((n for n, number in enumerate(sequence) if number == heads[0]), len(sequence))
        end = len(sequence)
        if heads[0] in sequence:
            last = len(sequence) - 1 - sequence[::-1].index(heads[0])
            end = end if heads[1] in sequence[last:] else last
        messages = []
        for turn in known.text(sequence[begun:end]).split(HEAD_START)[1:]:
            role, _, content = turn.partition(HEAD_END)
            messages.append({"role": role, "content": content.removeprefix(BREAK).removesuffix(TURN_END)})
        if not messages:
            return [IGNORE] * len(sequence)
        sample = training_sample(processor, normalise(messages), max_length=end - begun + 1)
        found = [label if label == IGNORE else known.original[label] for label in sample["labels"]]
        if begun != 1:  # the template writes one begin token
            found = [IGNORE] * begun + found[1:]
        return found + [IGNORE] * (len(sequence) - end)

    return examples(labelled, sequences)


def _roles(sequences: Sequence[Sequence[int]], begin: int, end: int, assistant: int) -> dict[str, int]:
    """Ids of the other roles by name: one that is alone, or not only in front, is the user's."""
    front: set[int] = set()
    later: set[int] = set()
    for sequence in sequences:
        turns = [n for n, i in enumerate(sequence[:-2]) if i == begin and sequence[n + 2] == end]
        for place, turn in enumerate(turns):
            (later if place else front).add(sequence[turn + 1])
    front, later = front - {assistant}, later - {assistant}
    user = min(later or front, default=None)
    system = min(front - {user}, default=None)
    return {name: number for name, number in (("user", user), ("system", system)) if number is not None}


def packing(case: Case) -> dict[str, Any]:
    """Chunks of a stream."""
    inputs = take(case.inputs)
    samples, chunk = inputs["samples"], inputs["chunk"]
    lengths = [len(sample["ids"]) for sample in samples]
    rows = chunks(range(len(samples)), lengths, chunk)
    collate = Collator(0, chunk, packing=True, joined=True)
    found: dict[str, Any] = {"input_ids": [], "labels": []}
    for row in rows:
        pieces = [(samples[piece], slice(piece.begin, piece.end)) for piece in row]
        batch = collate([{"input_ids": s["ids"][cut], "labels": s["labels"][cut]} for s, cut in pieces])
        for name in found:
            found[name] += batch[name].tolist()
    return found | {"dropped_tokens": sum(lengths) - chunk * len(rows)}


# Losses


def sft_loss(case: Case) -> dict[str, Any]:
    """Cross entropy of the labelled tokens, by token and by sample."""
    inputs = take(case.inputs)
    logits, labels = torch.tensor(inputs["logits"], dtype=torch.float64), torch.tensor(inputs["labels"])
    targets = targets_of(labels)
    losses = -token_logps(logits.flatten(0, 1), targets.ids, targets.sources)
    rows = [losses[targets.owners == row].tolist() for row in range(len(labels))]
    means = -sequence_logps(logits, labels, average=True)
    return {
        "token_losses": rows,
        "mean_over_tokens": losses.mean().item(),
        "mean_of_sample_means": means[~means.isnan()].mean().item(),
    }


def dpo_loss(case: Case) -> dict[str, Any]:
    """Losses, rewards and gradients of pairs."""
    inputs = take(case.inputs)
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")

    def summed(pair: Mapping[str, Any], name: str) -> Tensor:
        mask = torch.tensor(pair[f"{name.split('_')[1]}_mask"], dtype=torch.bool)
        return torch.tensor(pair[name], dtype=torch.float64)[mask].sum()

    sums = [torch.stack([summed(pair, name) for pair in inputs["pairs"]]) for name in names]
    policy = [values.requires_grad_() for values in sums[:2]]
    losses, chosen, rejected = pair_losses(Pairs(*policy, *sums[2:]), beta=inputs["beta"])
    gradients = torch.autograd.grad(losses.sum(), policy)
    margins = chosen - rejected
    rows = [
        {
            "logps": {name: values[number].item() for name, values in zip(names, sums, strict=True)},
            "loss": losses[number].item(),
            "reward_chosen": chosen[number].item(),
            "reward_rejected": rejected[number].item(),
            "margin": margins[number].item(),
            "accuracy": float(margins[number] > 0),
            "dloss_dlogp_chosen": gradients[0][number].item(),
            "dloss_dlogp_rejected": gradients[1][number].item(),
        }
        for number in range(len(losses))
    ]
    means = {"mean_loss": losses, "mean_margin": margins, "mean_accuracy": (margins > 0).double()}
    return {"per_pair": rows} | {name: values.mean().item() for name, values in means.items()}


# Evaluation


def likelihood_ranking(case: Case) -> dict[str, Any]:
    """Values, choices and accuracies of every ranking."""
    questions = take(case.inputs["questions"])
    rows, right = [], {"sum": [], "token": [], "char": []}
    for question in questions:
        likelihoods = []
        for option in question["options"]:
            own = {"sum": sum(option["token_logprobs"]), "tokens": len(option["token_logprobs"])}
            own["characters"] = len(option["text"])
            if option.get("unconditional_token_logprobs") is not None:
                own["unconditional"] = sum(option["unconditional_token_logprobs"])
            likelihoods.append(own)
        values = ranking_values(likelihoods)
        row = {"sum": values["sum"], "mean_per_token": values["per_token"], "mean_per_char": values["per_character"]}
        choices = {"sum": "sum", "token": "per_token", "char": "per_character"}
        for name, own in choices.items():
            row[f"pred_{name}"] = first_best(values[own])
            right[name].append(row[f"pred_{name}"] == question["gold"])
        row["probs_sum"] = shares(values["sum"])
        if "pmi" in values:
            row |= {"pmi": values["pmi"], "pred_pmi": first_best(values["pmi"])}
        rows.append(row)
    return {"questions": rows, "accuracy": {name: sum(own) / len(own) for name, own in right.items()}}


def elo(case: Case) -> dict[str, Any]:
    """Ratings of battles."""
    inputs = take(case.inputs)
    models, battles = inputs["models"], [tuple(battle) for battle in inputs["battles"]]
    ratings, history = online_elo(models, battles, inputs["K"], inputs["init"])
    return {
        "online_elo": ratings,
        "history": [list(both) for both in history],
        "bradley_terry_scaled": bradley_terry(models, battles, inputs["init"]),
        "win_rate": win_rates(models, battles),
    }


ADAPTERS = {
    "chat_prompt": chat_prompt,
    "sft_labels": sft_labels,
    "packing": packing,
    "sft_loss": sft_loss,
    "dpo_loss": dpo_loss,
    "likelihood_ranking": likelihood_ranking,
    "elo": elo,
}
