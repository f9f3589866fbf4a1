"""Metrics as functions of predictions and references.

    answers      one answer against gold answers: VQA accuracy, ANLS, yes/no rates, multiple choice, boxes
    text         running text against reference texts, by registered name (`coco_bleu_4`, `google_rouge_l`)
    agreement    two raters of the same items: correlations

Files, prompts and percent signs are the benchmarks' business. Importing this package registers the text metrics by name
and loads nothing heavy.
"""

from llavakit.registry import TEXT_METRICS

_TEXT_METRICS = (
    *(f"coco_bleu_{order}" for order in (1, 2, 3, 4)),
    *("coco_rouge_l", "coco_cider"),
    *("nltk_bleu_1", "nltk_bleu_4", "nltk_bleu_1_smoothed", "nltk_bleu_4_smoothed"),
    *("sacrebleu_1", "sacrebleu_4"),
    *("google_rouge_1", "google_rouge_2", "google_rouge_l"),
    *("medical_precision", "medical_recall", "medical_f1"),
)

TEXT_METRICS.add("pypi_rouge_l", "llavakit.evaluation.metrics.rouge:pypi_rouge_l")

for _name in _TEXT_METRICS:
    TEXT_METRICS.add(_name, f"llavakit.evaluation.metrics.text:{_name}")
