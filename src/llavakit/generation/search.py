"""Search on top of the engine: branches that fork from a shared prefix, stop at a marker, are judged, and go on.

A branch is a request plus the tokens chosen so far. Growing it submits the longer prompt; the engine finds the
states of the prefix (and the picture's vectors) and copies them, so that a fork computes new tokens only. Nothing
here knows what a stage is or how a judge decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llavakit.generation.engine import Engine
from llavakit.generation.request import Reply, Request, SamplingParams
from llavakit.generation.stopping import generate_options
from llavakit.model.prompt import PromptInfo


@dataclass(frozen=True)
class Branch:
    """A reply in the making.

    Attributes:
        request: The prompt with its media.
        ids: Tokens chosen so far.
        text: Their text, markers included.
        last: The reply that the newest growth gave, None at the root.
    """

    request: Request
    ids: tuple[int, ...] = ()
    text: str = ""
    last: Reply | None = None

    @property
    def finished(self) -> bool:
        """Whether the newest growth ended by itself rather than at a marker or at its length."""
        return self.last is not None and self.last.finish_reason == "stop" and self.last.stop is None


def expand_branches(engine: Engine, branches: Sequence[Branch], sampling: SamplingParams) -> list[list[Branch]]:
    """Continue every branch `sampling.n` times, all of them together; the stop strings are the markers.

    Returns:
        Per branch its continuations; a branch that is finished comes back alone.
    """
    handles = {
        number: engine.submit(_longer(branch, sampling), stream=False)
        for number, branch in enumerate(branches)
        if not branch.finished
    }
    grown = []
    for number, branch in enumerate(branches):
        if number not in handles:
            grown.append([branch])
            continue
        result = handles[number].result()
        grown.append([_joined(branch, reply) for reply in (result if isinstance(result, list) else [result])])
    return grown


def _longer(branch: Branch, sampling: SamplingParams) -> Request:
    """The request whose prompt ends with the branch's tokens."""
    request = replace(branch.request, sampling=sampling)
    if not branch.ids:
        return request
    if request.inputs_embeds is not None:
        raise ValueError("a branch that grows twice needs a request with input_ids, this one has embeddings only")
    ids = [*request.ids(), *branch.ids]
    return replace(request, input_ids=ids, generated=request.generated + len(branch.ids))


def _joined(branch: Branch, reply: Reply) -> Branch:
    text = branch.text + reply.text + (reply.stop or "")
    return Branch(branch.request, branch.ids + tuple(reply.token_ids), text, reply)


def best_of_n(engine: Engine, request: Request, score: Callable[[Sequence[Branch]], Sequence[float]]) -> Branch:
    """The best of `request.sampling.n` replies; of equals the first.

    Args:
        score: Gives every candidate a number, higher is better.
    """
    (candidates,) = expand_branches(engine, [Branch(request)], request.sampling)
    scores = list(score(candidates))
    return candidates[max(range(len(candidates)), key=scores.__getitem__)]


def stage_beam_search(
    engine: Engine,
    request: Request,
    markers: Sequence[str],
    choose: Callable[[str, Sequence[Branch]], Branch],
) -> Branch:
    """Stage by stage: sample candidates up to the stage's marker, keep one, go on from it.

    Args:
        request: Its `sampling` holds for every stage, `n` is the number of candidates.
        markers: End marker of every stage in order.
        choose: Given marker and candidates, the branch to go on with.
    """
    branch = Branch(request)
    for number, marker in enumerate(markers):
        seed = request.sampling.seed
        stage = replace(request.sampling, stop=(marker,), seed=None if seed is None else seed + number)
        (candidates,) = expand_branches(engine, [branch], stage)
        branch = choose(marker, candidates)
        if branch.finished:
            break
    return branch


def likelihood(
    engine: Engine, request: Request, replies: Sequence[Sequence[int]], *, mean: bool = False
) -> list[float]:
    """Log probability of given replies (token ids); `mean` divides by their lengths."""
    scores = engine.score(request, replies)
    return [float(score.mean() if mean else score.sum()) for score in scores]


def beam_search(engine: Engine, request: Request, num_beams: int, *, length_penalty: float = 1.0) -> list[int]:
    """Beam search by transformers' own `generate`, outside the batch; token ids of the best reply.

    The reply ends at the request's stop strings too; their tokens are part of it.
    """
    device, params = engine.device, request.sampling
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([request.ids()], device=device),
        "pixel_values": request.pixel_values,
        "visual_sizes": request.visual_sizes,
        "visual_modalities": request.visual_modalities,
        "visual_regions": request.visual_regions,
    }
    if request.answers is not None:
        inputs["prompt_info"] = PromptInfo(torch.as_tensor(request.answers, device=device)[None].bool())
    inputs = {name: value for name, value in inputs.items() if value is not None}
    options = generate_options(params, engine.tokenizer, engine.eos_token_ids)
    output = engine.model.generate(
        **inputs,
        **options,
        num_beams=num_beams,
        length_penalty=length_penalty,
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        pad_token_id=0,
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()
