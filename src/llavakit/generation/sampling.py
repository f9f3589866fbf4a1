"""Choosing the next token of many rows at once, each with parameters and randomness of its own.

The order of the filters is transformers': repetition penalty, temperature, top-k, top-p, min-p. A row draws from a
generator of its own, one number per token, so that its neighbours in the batch never change its reply.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llavakit.generation.request import SamplingParams, TokenLogprob

_DRAWN_AT_ONCE = 64
_COLDEST = 1e-4  # below, divided logits overflow; this cold already only ties are drawn
_NUCLEUS_GUESS = 512  # most nuclei are smaller; sorting only this many spares a sort of the whole vocabulary


def choice_seed(seed: int, index: int) -> int:
    """Seed of one of several replies: reply 0 has the request's own, so it is what a request for one reply gets."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**63


def call_seed(seed: int, number: int) -> int:
    """Seed of one of several calls that follow each other; never that of another reply's call."""
    return (seed + number * 0xD1B54A32D192ED03) % 2**63


class RowRng:
    """Uniform numbers of one reply.

    Args:
        seed: Seed of the request; None takes one from torch's default generator.
        index: Number of the reply, each has a stream of its own.
    """

    def __init__(self, seed: int | None, index: int = 0) -> None:
        if seed is None:
            seed = int(torch.randint(2**62, ()).item())
        self._generator = torch.Generator().manual_seed(choice_seed(seed, index))
        self._numbers: list[float] = []

    def next(self) -> float:
        """The next number in [0, 1)."""
        if not self._numbers:
            numbers = torch.rand(_DRAWN_AT_ONCE, generator=self._generator, dtype=torch.float64)
            self._numbers = numbers.flip(0).tolist()
        return self._numbers.pop()


class TokenSampler:
    """Parameters of a fixed set of rows as tensors.

    Args:
        params: Parameters of every row.
        device: Where the logits will be.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        self.rows = [row for row, one in enumerate(params) if one.temperature > 0]
        self.all_sampled = len(self.rows) == len(params)
        self._penalised = [row for row, one in enumerate(params) if one.repetition_penalty != 1]
        self._reported = {row: one.logprobs for row, one in enumerate(params) if one.logprobs is not None}
        chosen = [params[row] for row in self.rows]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(-1)

        self._index = torch.tensor(self.rows, dtype=torch.long, device=device)
        self._temperature = column([max(one.temperature, _COLDEST) for one in chosen])
        self._top_p = column([one.top_p for one in chosen])
        self._top_k = column([one.top_k or torch.inf for one in chosen])
        self._min_p = column([one.min_p for one in chosen])
        self._widest_k = max((one.top_k or 2**31 for one in chosen), default=0)
        self._uses_p = any(one.top_p < 1 for one in chosen)
        self._uses_min_p = any(one.min_p > 0 for one in chosen)
        self._penalty = column([params[row].repetition_penalty for row in self._penalised])

    def choose(
        self, logits: Tensor, rng: Sequence[RowRng | None], seen: Sequence[Tensor | None]
    ) -> tuple[list[int], list[bool], dict[int, TokenLogprob]]:
        """Next token of every row.

        Args:
            logits: [rows, vocabulary].
            randomness: Of every row that samples.
            seen: Per row with a repetition penalty, which ids occurred [vocabulary].

        Returns:
            Token ids, whether each row's logits were sound (a row with NaN has none to choose from), and the log
            probabilities of the rows that want them.
        """
        logits = logits.float()
        raw = logits
        if self._penalised:
            logits = self._penalise(logits, seen)
        best, tokens = logits.max(-1)
        sound = torch.isfinite(best)
        if self.rows:
            own = logits if self.all_sampled else logits[self._index]
            if not bool(sound.all()):
                own = own.nan_to_num(nan=0.0, posinf=0.0)
            numbers = torch.tensor([rng[row].next() for row in self.rows], dtype=torch.float64)
            drawn = self._draw(own, numbers.to(logits.device).unsqueeze(-1))
            tokens = drawn if self.all_sampled else tokens.index_copy(0, self._index, drawn)
        ids, good = torch.stack([tokens, sound.long()]).tolist()  # one wait for the device
        reports = {row: self._report(raw[row], ids[row], count) for row, count in self._reported.items()}
        return ids, [bool(one) for one in good], reports

    def _penalise(self, logits: Tensor, seen: Sequence[Tensor | None]) -> Tensor:
        rows = torch.tensor(self._penalised, device=logits.device)
        own = logits[rows]
        punished = torch.where(own < 0, own * self._penalty, own / self._penalty)
        marks = torch.stack([seen[row] for row in self._penalised])
        return logits.index_copy(0, rows, torch.where(marks, punished, own))

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unnormalised probabilities of what the filters keep.

        Args:
            logits: Of the rows that sample [rows, vocabulary], penalties applied.

        Returns:
            Probabilities [rows, kept] and their token ids [rows, kept]; ids None means all tokens in order.
        """
        scaled = logits / self._temperature
        vocabulary = scaled.shape[-1]
        filtered = self._uses_p or self._uses_min_p or self._widest_k < vocabulary
        if not filtered:
            return scaled.softmax(-1), None
        if self._widest_k < vocabulary:
            top, ids = scaled.topk(min(self._widest_k, vocabulary), dim=-1)
        elif self._uses_p:
            top, ids = self._nucleus(scaled)
        else:
            top, ids = scaled, None
        if ids is None:  # only min-p, which needs no order
            probabilities = top.softmax(-1)
            return probabilities * (probabilities >= self._min_p * probabilities.amax(-1, keepdim=True)), None
        # ranks beyond top-k go first, so that the nucleus is taken of what remains
        ranks = torch.arange(top.shape[-1], device=top.device)
        within = ranks < self._top_k
        whole = top.masked_fill(~within, -torch.inf)
        total = self._log_total(scaled, whole)
        probabilities = (whole - total).exp()
        before = probabilities.cumsum(-1) - probabilities
        keep = (before < self._top_p) | (ranks == 0)
        keep &= within & (probabilities >= self._min_p * probabilities[:, :1])
        return probabilities * keep, ids

    def _log_total(self, scaled: Tensor, top: Tensor) -> Tensor:
        """Log of the sum over what top-k leaves: rows without top-k count the tokens that were not sorted too."""
        unlimited = torch.isinf(self._top_k)
        return torch.where(unlimited, scaled.logsumexp(-1, keepdim=True), top.logsumexp(-1, keepdim=True))

    def _nucleus(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable tokens in order, enough of them for every row's top-p."""
        if scaled.shape[-1] > 4 * _NUCLEUS_GUESS and bool(((self._top_p < 1) | (self._top_k < _NUCLEUS_GUESS)).all()):
            top, ids = scaled.topk(_NUCLEUS_GUESS, dim=-1)
            held = (top - scaled.logsumexp(-1, keepdim=True)).exp().sum(-1, keepdim=True)
            if bool(((held >= self._top_p) | (self._top_k < _NUCLEUS_GUESS)).all()):
                return top, ids
        return scaled.sort(dim=-1, descending=True)

    def _draw(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Inverse of the cumulative distribution at the drawn numbers, [rows]."""
        probabilities, ids = self.candidates(logits)
        reached = probabilities.double().cumsum(-1)
        places = torch.searchsorted(reached, numbers * reached[:, -1:], right=True)
        places = places.clamp(max=probabilities.shape[-1] - 1)
        return (places if ids is None else ids.gather(-1, places)).squeeze(-1)

    @staticmethod
    def _report(logits: Tensor, token: int, count: int) -> TokenLogprob:
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(count, logits.shape[-1]))
        return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
