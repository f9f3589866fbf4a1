"""Scoring reports with intervals: sums over reports beside computing every resample from its texts.

    python benchmarks/report_scores.py                      2,461 reports, 500 resamples
    python benchmarks/report_scores.py --reports 60 --direct 500

The direct way is what the packages offer: `corpus_score` of sacrebleu and `score` of rouge-score for every resample. It
is timed on `--direct` of the resamples and scaled to all; on these the values of both ways are asserted equal, and
where all are computed the medians too. llavakit's time is that of all weight-free metrics of `llavakit score report`.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from llavakit.evaluation.metrics.resampling import draw, estimates, resample
from llavakit.evaluation.reports.audit import paraphrase, report
from llavakit.evaluation.reports.files import Reports
from llavakit.evaluation.reports.metrics import Sources, computed
from llavakit.phantom.base import generator
from llavakit.phantom.patient import MODALITIES, SETTINGS, draw_findings

COMPARED = (
    *(f"sacrebleu_{n}" for n in (1, 2, 3, 4)),
    *(f"google_rouge_{kind}{stemmed}" for stemmed in ("", "_stemmed") for kind in ("1", "2", "l")),
)
SENTENCES = (
    "Lung volumes are low with crowding of the bronchovascular structures.",
    "The cardiomediastinal and hilar contours are within normal limits.",
    "Median sternotomy wires are intact and in unchanged position.",
    "Mild degenerative changes of the thoracic spine are noted.",
    "There is minimal blunting of the left costophrenic angle.",
)


def texts(count: int) -> tuple[list[str], list[str]]:
    """Pairs of reports of about 60 words: a reference, and another wording with other filling sentences."""
    rng, words = generator(0, 0, "benchmark of scores"), random.Random(0)
    ours, theirs = [], []
    for _ in range(count):
        findings = draw_findings(rng, MODALITIES, 2, SETTINGS["full"])
        ours.append(" ".join([paraphrase(rng, findings), *words.sample(SENTENCES, 3)]))
        theirs.append(" ".join([report(findings), *words.sample(SENTENCES, 3)]))
    return ours, theirs


def direct(name: str, ours: list[str], theirs: list[str]) -> float:
    """One resample by the package."""
    toolkit, kind, *stemmed = name.replace("rouge_", "").split("_")
    if toolkit == "sacrebleu":
        return BLEU(max_ngram_order=int(kind)).corpus_score(ours, [theirs]).score / 100
    rouge = f"rouge{kind.upper()}"
    scorer = RougeScorer([rouge], use_stemmer=bool(stemmed))
    return float(np.mean([scorer.score(b, a)[rouge].fmeasure for a, b in zip(ours, theirs, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=int, default=2461)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--direct", type=int, default=1, help="resamples that the packages compute")
    options = parser.parse_args()
    ours, theirs = texts(options.reports)
    length = np.mean([len(text.split()) for text in theirs])
    ids, none = [str(n) for n in range(options.reports)], [None] * options.reports
    files = [Reports("texts", ids, side, none, none) for side in (ours, theirs)]
    computed(*(file.ordered(ids[:2]) for file in files), Sources())  # imports

    begun = time.process_time()
    sums, _ = computed(*files, Sources())
    counted = time.process_time()
    rows = draw(options.reports, options.resamples)
    found = dict(zip(sums, estimates(list(sums.values()), rows), strict=True))
    whole, drawn = time.process_time() - begun, time.process_time() - counted
    print(f"{options.reports} pairs of reports of {length:.0f} words, {options.resamples} resamples, processor time\n")
    print("| | seconds |\n|---|---|")
    print(f"| llavakit, {len(sums)} metrics without weights | {whole:.1f} (resamples {drawn:.2f}) |")

    tried = rows[: options.direct]
    values = {name: resample([sums[name]], tried)[0] for name in COMPARED}
    total = 0.0
    for name in COMPARED:
        begun = time.process_time()
        wanted = [direct(name, [ours[n] for n in row], [theirs[n] for n in row]) for row in tried]
        total += (time.process_time() - begun) * options.resamples / len(tried)
        np.testing.assert_allclose(values[name], wanted, atol=1e-9)
        if len(tried) == options.resamples:
            assert abs(np.median(wanted) - found[name].median) < 1e-9
    extent = "all" if len(tried) == options.resamples else f"scaled from {len(tried)}"
    print(f"| sacrebleu and rouge-score, {len(COMPARED)} metrics, every resample ({extent}) | {total:.0f} |")
    print(f"| ratio | **{total / whole:.0f}** |")


if __name__ == "__main__":
    main()
