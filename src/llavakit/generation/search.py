"""Search over replies: branches that fork from a shared prefix, stop at a marker, are judged, and go on.

    root = chat.begin(messages)
    sampling = SamplingParams(n=4, temperature=0.6, seed=0)
    branch = stage_beam_search(chat.expand, root, sampling, ["</CAPTION>", "</CONCLUSION>"], choose)

A branch is a prompt plus the tokens chosen so far. Expanding it submits the longer prompt; the engine finds the
states of the prefix (and the picture's vectors) and copies them, so that a fork computes new tokens only. Nothing
here knows what a stage is or how a judge decides: `choose` may ask any responder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llavakit.generation.engine import Engine
from llavakit.generation.request import Reply, Request, SamplingParams
from llavakit.generation.response import Usage
from llavakit.generation.sampling import call_seed, choice_seed

if TYPE_CHECKING:
    from llavakit.generation.responder import Call


@dataclass(frozen=True)
class Branch:
    """A reply in the making.

    Attributes:
        request: The prompt with its media.
        ids: Tokens chosen so far.
        text: Their text, markers included.
        last: The reply that the newest expansion gave, None at the root.
    """

    request: Request
    ids: tuple[int, ...] = ()
    text: str = ""
    last: Reply | None = None

    @property
    def finished(self) -> bool:
        """Whether the newest expansion ended by itself rather than at a marker or at its length."""
        return self.last is not None and self.last.finish_reason == "stop" and self.last.stop is None

    @property
    def ended(self) -> bool:
        """Whether there is nothing to go on from: it is finished, or was cut at its length."""
        return self.finished or (self.last is not None and self.last.finish_reason == "length")


Expand = Callable[[Sequence[Branch], SamplingParams], list[list[Branch]]]  # `Chat.expand`
Count = Callable[[Usage], None]


def expand_branches(
    engine: Engine,
    branches: Sequence[Branch],
    sampling: SamplingParams,
    count: Count | None = None,
    call: Call | None = None,
) -> list[list[Branch]]:
    """Continue every branch `sampling.n` times, all of them together; the stop strings are the markers.

    Where the branch's own request says that a reply ends (the chat template's stop strings), the branch is finished.
    Every continuation draws from a stream of its own.

    Args:
        count: Called with what the continuations of a branch took.
        call: The request that this is done for; what is decoded is cancelled with it.

    Returns:
        Per branch its continuations; a branch that is finished comes back alone.

    Raises:
        Cancelled: If the request was cancelled.
    """
    handles = {}
    for number, branch in enumerate(branches):
        if not branch.finished:
            seed = None if sampling.seed is None else choice_seed(sampling.seed, number * sampling.n)
            handles[number] = engine.submit(_longer(branch, replace(sampling, seed=seed)), stream=False)
    with contextlib.nullcontext() if call is None else call.holding(*handles.values()):
        found = {number: handle.result() for number, handle in handles.items()}
    grown = []
    for number, branch in enumerate(branches):
        if number not in found:
            grown.append([branch])
            continue
        replies = found[number] if isinstance(found[number], list) else [found[number]]
        if count is not None:
            count(handles[number].usage)
        grown.append([_joined(branch, reply, sampling.stop) for reply in replies])
    if call is not None:
        call.check()
    return grown


def _longer(branch: Branch, sampling: SamplingParams) -> Request:
    """The request whose prompt ends with the branch's tokens."""
    own = branch.request.sampling
    eos = own.eos_token_ids if sampling.eos_token_ids is None else sampling.eos_token_ids
    stop = (*sampling.stop, *(end for end in own.stop if end not in sampling.stop))
    request = replace(branch.request, sampling=replace(sampling, eos_token_ids=eos, stop=stop))
    if not branch.ids:
        return request
    if request.inputs_embeds is not None:
        raise ValueError("a branch that is expanded twice needs a request with input_ids, this one has embeddings only")
    ids = [*request.ids(), *branch.ids]
    return replace(request, input_ids=ids, generated=request.generated + len(branch.ids))


def _joined(branch: Branch, reply: Reply, markers: Sequence[str]) -> Branch:
    if reply.stop not in markers:
        reply = replace(reply, stop=None)
    text = branch.text + reply.text + (reply.stop or "")
    return Branch(branch.request, branch.ids + tuple(reply.token_ids), text, reply)


def best_of_n(
    expand: Expand, root: Branch, sampling: SamplingParams, score: Callable[[Sequence[Branch]], Sequence[float]]
) -> Branch:
    """The best of `sampling.n` replies; of equals the first.

    Args:
        score: Gives every candidate a number, higher is better.
    """
    (candidates,) = expand([root], sampling)
    scores = list(score(candidates))
    return candidates[max(range(len(candidates)), key=scores.__getitem__)]


def search_steps(
    expand: Expand,
    root: Branch,
    sampling: SamplingParams,
    until: Callable[[Branch], str | Sequence[str] | None],
    choose: Callable[[Sequence[Branch]], Branch],
) -> Iterator[Branch]:
    """Step by step: sample `sampling.n` candidates up to a marker, keep one, go on from it; gives what is kept of each.

    A step has what is left of `sampling.max_new_tokens`, which are those of the whole reply.

    Args:
        until: The stop strings of the next step, None to end.
        choose: The candidate to go on with.
    """
    branch, step = root, 0
    while not branch.ended and (stop := until(branch)) is not None:
        left = sampling.max_new_tokens - (len(branch.ids) - len(root.ids))
        if left <= 0:
            return
        seed = None if sampling.seed is None else call_seed(sampling.seed, step)
        (candidates,) = expand([branch], replace(sampling, stop=stop, seed=seed, max_new_tokens=left))
        branch, step = choose(candidates), step + 1
        yield branch


def search(
    expand: Expand,
    root: Branch,
    sampling: SamplingParams,
    until: Callable[[Branch], str | Sequence[str] | None],
    choose: Callable[[Sequence[Branch]], Branch],
) -> Branch:
    """The last branch of `search_steps`."""
    *_, last = root, *search_steps(expand, root, sampling, until, choose)
    return last


def stage_beam_search(
    expand: Expand,
    root: Branch,
    sampling: SamplingParams,
    markers: Sequence[str],
    choose: Callable[[str, Sequence[Branch]], Branch],
) -> Branch:
    """`search` whose steps end at given markers, one after the other.

    Args:
        markers: End marker of every stage in order.
        choose: Given marker and candidates, the branch to go on with.
    """
    left = list(markers)
    return search(
        expand,
        root,
        sampling,
        lambda branch: left[0] if left else None,
        lambda candidates: choose(left.pop(0), candidates),
    )
