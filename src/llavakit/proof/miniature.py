"""Miniatures: a paper's main claim re-tested with tiny models, and the verdict that the measurements allow.

This module knows statistics and nothing of models: arms measured under the same seeds, intervals, and the rule that
turns an interval into *supported*, *not supported* or *inconclusive*. The experiments live in the systems' folders.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"
CONFIDENCE = 0.95

Interval = tuple[float, float]


@functools.cache
def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t-distribution for a probability in (0.5, 1), found by bisection.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)

    # With t = sqrt(freedom) * tan(angle) the density becomes a power of the cosine on a finite range, smooth enough
    # for Simpson's rule even at one degree of freedom, where the density itself has no finite mean.
    def mass(angle: float, steps: int = 200) -> float:
        width = angle / steps
        weights = [1, *([4, 2] * (steps // 2))[:-1], 1]
        total = sum(w * math.cos(i * width) ** (freedom - 1) for i, w in enumerate(weights))
        return math.exp(log_scale) * math.sqrt(freedom) * total * width / 3

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean by the t-distribution; unbounded for fewer than two values."""
    if len(values) < 2:
        return (-math.inf, math.inf)
    mean = statistics.fmean(values)
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return (mean - half, mean + half)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: What was run ("query compression, 1 token").
        values: The metric under every seed, in the order of the seeds.
    """

    name: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation of the sample; 0 for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The paper's idea against its baseline in one metric, paired by seed.

    Attributes:
        metric: Name and unit ("accuracy", "tokens per second").
        idea, baseline: The two arms, measured under the same seeds.
        threshold: By how much the idea must be better than the baseline. Negative for a claim of no (great) loss:
            -0.02 asks that the idea is at most 0.02 worse.
        higher_is_better: False for errors, tokens, seconds, bytes.
    """

    metric: str
    idea: Arm
    baseline: Arm
    threshold: float = 0.0
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if len(self.idea.values) != len(self.baseline.values) or not self.idea.values:
            raise ValueError(f"{self.metric}: both arms need one value per seed")

    @property
    def gains(self) -> list[float]:
        """How much better the idea is under every seed, in the metric's unit."""
        sign = 1 if self.higher_is_better else -1
        return [sign * (a - b) for a, b in zip(self.idea.values, self.baseline.values, strict=True)]

    @property
    def outcome(self) -> str:
        """Supported if the whole interval of the gain reaches the threshold, not supported if none of it does."""
        low, high = interval(self.gains)
        if low >= self.threshold:
            return SUPPORTED
        return NOT_SUPPORTED if high < self.threshold else INCONCLUSIVE


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a miniature measured.

    Attributes:
        system: Slug of the system.
        claim: The claim in one sentence.
        paper: What the paper reports, in words and numbers.
        comparisons: Every comparison that the claim needs; all must hold.
        seeds: Seeds that were run.
        seconds: Time of the whole run.
        notes: What the reader must know to judge the result (data, sizes, budget).
    """

    system: str
    claim: str
    paper: str
    comparisons: tuple[Comparison, ...]
    seeds: tuple[int, ...]
    seconds: float = 0.0
    notes: str = ""

    @property
    def verdict(self) -> str:
        """Supported if all comparisons are, not supported if one is not, else inconclusive."""
        outcomes = {comparison.outcome for comparison in self.comparisons}
        if outcomes == {SUPPORTED}:
            return SUPPORTED
        return NOT_SUPPORTED if NOT_SUPPORTED in outcomes else INCONCLUSIVE

    def to_dict(self) -> dict[str, Any]:
        """All measured values and what follows from them, JSON-able."""

        def arm(side: Arm) -> dict[str, Any]:
            return {
                **asdict(side),
                "mean": side.mean,
                "std": side.std,
                "interval": _finite(interval(side.values)),
            }

        return {
            "system": self.system,
            "claim": self.claim,
            "paper": self.paper,
            "verdict": self.verdict,
            "comparisons": [
                {
                    "metric": c.metric,
                    "higher_is_better": c.higher_is_better,
                    "idea": arm(c.idea),
                    "baseline": arm(c.baseline),
                    "gain": {"mean": statistics.fmean(c.gains), "interval": _finite(interval(c.gains))},
                    "threshold": c.threshold,
                    "outcome": c.outcome,
                }
                for c in self.comparisons
            ],
            "seeds": list(self.seeds),
            "seconds": self.seconds,
            "notes": self.notes,
        }

    def table(self) -> Table:
        """The comparisons as a table for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        title = escape(f"{self.system}: {self.claim}")
        table = Table(title=title, caption=escape(self.notes) or None, title_justify="left")
        for heading in ("metric", "arm", "mean ± std", "95 % interval"):
            table.add_column(heading)
        for c in self.comparisons:
            for side in (c.baseline, c.idea):
                table.add_row(
                    c.metric, escape(side.name), f"{side.mean:.4g} ± {side.std:.2g}", _show(interval(side.values))
                )
            need = f"gain, at least {c.threshold:g} needed"
            table.add_row(
                c.metric, need, f"{statistics.fmean(c.gains):.4g}", f"{_show(interval(c.gains))}: {c.outcome}"
            )
            table.add_section()
        table.add_row("the paper", escape(self.paper))
        table.add_row("verdict", f"[bold]{self.verdict}[/bold]", f"{len(self.seeds)} seeds", f"{self.seconds:.0f} s")
        return table


def _finite(bounds: Interval) -> list[float | None]:
    return [bound if math.isfinite(bound) else None for bound in bounds]


def _show(bounds: Interval) -> str:
    return f"{bounds[0]:.4g} … {bounds[1]:.4g}"


@dataclass
class Measurements:
    """Values of every metric under every seed, as `run_seeds` collects them."""

    seeds: tuple[int, ...]
    values: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def arm(self, key: str, name: str | None = None) -> Arm:
        """The values called `key` as an arm."""
        return Arm(name or key, tuple(self.values[key]))


def run_seeds(
    function: Callable[..., Mapping[str, float]],
    seeds: Sequence[int],
    progress: Callable[[str], None] | None = None,
    workers: int | None = None,
    parts: Sequence[str] | None = None,
) -> Measurements:
    """Run an experiment once per seed, as many at a time as there are cores, with one thread each.

    Args:
        function: Runs all arms under one seed and returns the metrics by name, the same names for every seed;
            importable by name unless there is one worker, see `llavakit.proof.parallel.run_each`.
        progress: Called with one line after every seed.
        workers: Processes; default: one per core.
        parts: What an experiment consists of, the longest first, if its parts can run apart: `function` is called with
            a seed and each of them, and what the parts of a seed measure is put together. So few seeds fill all cores.

    Raises:
        llavakit.proof.parallel.WorkerError: If the experiment failed in a worker; it names the seed.
    """
    from llavakit.proof.parallel import run_each

    started = time.perf_counter()
    runs: list[Any] = list(seeds) if parts is None else [(seed, part) for part in parts for seed in seeds]
    run = function if parts is None else functools.partial(_part, function)
    pieces: dict[int, dict[int, Mapping[str, float]]] = {number: {} for number in range(len(seeds))}
    found: dict[int, dict[str, float]] = {}
    for place, metrics in run_each(run, runs, workers, name="seed"):
        part, number = divmod(place, len(seeds))
        pieces[number][part] = metrics
        if len(pieces[number]) < len(runs) // len(seeds):
            continue
        whole = {name: value for _, piece in sorted(pieces[number].items()) for name, value in piece.items()}
        if found and set(whole) != set(known := next(iter(found.values()))):
            raise ValueError(f"seed {seeds[number]} measured {sorted(whole)}, another one {sorted(known)}")
        found[number] = whole
        if progress is not None:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in whole.items())
            progress(f"seed {seeds[number]} ({len(found)} of {len(seeds)}): {shown}")
    names = found[0] if found else {}
    values = {name: [float(found[number][name]) for number in range(len(seeds))] for name in names}
    return Measurements(tuple(seeds), values, time.perf_counter() - started)


def _part(function: Callable[..., Mapping[str, float]], given: tuple[int, str]) -> Mapping[str, float]:
    return function(*given)
