"""Yes-or-no questions of a phantom world as POPE's files and as a local task of lmms-eval, to compare their scores.

    python scripts/lmms_eval_pope.py runs/demo/data/thorax/heldout_questions.jsonl FOLDER

FOLDER gets `questions.jsonl` for `llavakit eval --task pope`, and `task/` for `lmms_eval --include_path FOLDER/task
--tasks phantom_pope`, which uses lmms-eval's own prompts and metrics of POPE. See docs/serving.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets

SUFFIX = "\nAnswer the question using a single word or phrase."
TASK = """\
task: phantom_pope
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pope_doc_to_visual
doc_to_text: !function utils.pope_doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
process_results: !function utils.pope_process_results
metric_list:
{metrics}
lmms_eval_specific_kwargs:
  default: {{pre_prompt: "", post_prompt: "{suffix}"}}
metadata:
  - version: 0.0
"""
METRICS = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")


def main(source: Path, folder: Path) -> None:
    """Write both forms of the questions."""
    questions = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    chosen = [one for one in questions if one["answer"].lower() in ("yes", "no")]
    task = folder / "task"
    task.mkdir(parents=True, exist_ok=True)
    rows = []
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for one in chosen:
            text, label = one["text"].removesuffix(SUFFIX), one["answer"].lower()
            image = str((source.parent / one["image"]).resolve())
            row = {"question_id": one["question_id"], "image": image}
            file.write(json.dumps(row | {"text": text, "label": label}) + "\n")
            rows.append(row | {"question": text, "answer": label})
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data.to_parquet(task / "test.parquet")
    metrics = "\n".join(
        f"  - {{metric: pope_{name}, aggregation: !function utils.pope_aggregate_{name}, higher_is_better: true}}"
        for name in METRICS
    )
    suffix = SUFFIX.replace("\n", "\\n")
    text = TASK.format(data=(task / "test.parquet").resolve(), metrics=metrics, suffix=suffix)
    (task / "phantom_pope.yaml").write_text(text, encoding="utf-8")
    (task / "utils.py").write_text("from lmms_eval.tasks.pope.utils import *\n", encoding="utf-8")
    print(f"{len(chosen)} questions: {folder / 'questions.jsonl'} and {task}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
