"""Score a model by a rule of your own: python examples/own_benchmark.py MODEL QUESTIONS ANSWERS.jsonl"""

import sys

import llavakit
from llavakit.evaluation.benchmarks.generic import ListedBenchmark, texts_of
from llavakit.evaluation.run import evaluate
from llavakit.evaluation.score import print_result
from llavakit.registry import BENCHMARKS


class Mentions(ListedBenchmark):
    """Share of replies that mention the answer anywhere; questions are JSONL with text, answer and image."""

    title, metric = "Mentions", "mentioned"

    def value(self, question, text):
        return any(answer.lower() in text.lower() for answer in texts_of(question))


BENCHMARKS.add("mentions", Mentions)
model_path, questions, answers = sys.argv[1:]
print_result(evaluate(llavakit.load(model_path), "mentions", questions, answers, max_new_tokens=32))
