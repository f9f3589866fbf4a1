"""Let a model judge answers: python examples/judge.py JUDGE ANSWERS.jsonl GOLD.jsonl

JUDGE is a model folder or an address, http://localhost:8000/v1#NAME. ANSWERS is what `llavakit eval` wrote.
"""

import re
import sys

from llavakit.evaluation.judges import Judge
from llavakit.evaluation.records import pair, read_answers, read_records
from llavakit.generation.remote import CallFailed

ASK = "Question: {}\nRight answer: {}\nAnswer of a student: {}\nIs the student right? Reply with yes or no."
judge_path, answers, gold = sys.argv[1:]
judge = Judge(judge_path, temperature=0.0, max_tokens=8, cache=f"{answers}.judged")  # an interrupted run goes on
pairs = [(g.data, a.data) for g, a in pair(read_records(gold), read_answers(answers), missing="wrong") if a]
asked = [[{"role": "user", "content": ASK.format(g["text"], g["answer"], a["text"])}] for g, a in pairs]
verdicts = judge.ask_all(asked)
words = ["" if isinstance(v, CallFailed) else v.lower() for v in verdicts]
counts = {word: sum(bool(re.search(rf"\b{word}\b", verdict)) for verdict in words) for word in ("yes", "no")}
print(f"{counts['yes']} right, {counts['no']} wrong, {len(words) - sum(counts.values())} without a verdict")
