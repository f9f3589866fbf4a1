"""MG-LLaVA's golden components of text."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.conversation.messages import from_llava, normalise
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.benchmarks.mmbench import rounds
from llavakit.proof.entries import original_ids, scored, text_processor, with_blank_media
from llavakit.proof.golden import Case, Example, Result, examples
from llavakit.registry import BENCHMARKS
from llavakit.systems.mg_llava.benchmarks import distance, first_letters, yes_or_no
from llavakit.systems.mg_llava.checkpoint import TEMPLATES
from llavakit.training.dataset import StageCollator

SPECIAL = ("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>")
SPECIAL += ("<|end|>", "<|im_start|>", "<|im_end|>", "<|system|>")
FIRST_SPECIAL = 300  # id of the first of them in the cases' tokenizer


def toy_tokenizer() -> Any:
    """The cases' tokenizer: bytes and the special tokens of all four templates, no begin token by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary |= {token: FIRST_SPECIAL + number for number, token in enumerate(SPECIAL)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:]),
    )


def dialog_encoding(case: Case) -> Iterator[Example]:
    """Ids and labels of conversations, cut at the right."""
    tokenizer = toy_tokenizer()

    def run(sample: Mapping[str, Any]) -> Result:
        sample = dict(sample)
        images = sum(turn["value"].count("<image>") for turn in sample["conversations"])
        record = {"conversations": sample["conversations"], **({"image": ["-"] * images} if images else {})}
        processor = text_processor(tokenizer, TEMPLATES[sample["template"]])
        encoded = processor.encode(with_blank_media(from_llava(record)))
        batch = StageCollator(0, sample["max_length"])([encoded])
        ids, labels = (batch[name][0].tolist() for name in ("input_ids", "labels"))
        ignored = {"samples.*.turns": "strings before they are tokenised; the ids show them"}
        return Result(json={"input_ids": original_ids(processor, ids), "labels": labels}, ignored=ignored)

    yield from examples(run, case.inputs["samples"], "samples")


SENTENCES = {
    "chartqa": "mg_chartqa",
    "gvqa": "mg_docvqa",
    "tallyqa": "mg_tallyqa",
    "hallusion": "mg_hallusion",
    "pope": "mg_pope",
    "mme": "mg_mme",
}
IMAGE = {"type": "image", "image": "-"}


def asked(sample: Mapping[str, Any]) -> Question:
    """A question as its benchmark puts it."""
    name, text = sample["dataset"], sample["question"]
    if name == "multiple_choice":
        options = re.findall(r"^([A-Z])\. (.*)$", sample.get("options") or "", re.MULTILINE)
        row = {"question": text, "hint": sample.get("context"), **dict(options)}
        choice = BENCHMARKS.get("mg_multiple_choice")()
        return Question(0, rounds(row, chinese=choice.is_chinese(row), letters=choice.letters)[0]["message"], (IMAGE,))
    if sample.get("options") or sample.get("context"):
        raise UserError("options and context belong to multiple choice")
    if name not in SENTENCES:
        return Question(0, text, (IMAGE,))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        row = {"question_id": 0, "image": "-", "text": text}
        file.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
        (question,) = BENCHMARKS.get(SENTENCES[name])().questions(file)
    return question


def eval_prompts(case: Case) -> Iterator[Example]:
    """Prompts of the benchmarks, read back from their ids."""
    tokenizer = toy_tokenizer()

    def run(sample: Mapping[str, Any]) -> Result:
        processor = text_processor(tokenizer, TEMPLATES[sample["template"]])
        messages = with_blank_media(normalise(asked(sample).messages()))
        if sample.get("use_system"):
            messages = [{"role": "system", "content": [{"type": "text", "text": ""}]}, *messages]
        ids = processor.encode(messages, add_generation_prompt=True)["input_ids"]
        return Result(json={"text": processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)})

    yield from examples(run, case.inputs["samples"], "samples")


# Scores


def metrics(case: Case) -> Iterator[Example]:
    """Answers read, and benchmarks scored."""
    inputs = case.inputs

    def listed(name: str, value: Callable[..., Any]) -> list[Any]:
        return [value(item) for item in inputs.get(name) or []]

    def docvqa(pair: Any) -> float:
        references, text = pair
        return scored("mg_docvqa", [text], [{"answers": list(references)}])["anls"] / 100

    def pope_rates() -> dict[str, Any]:
        found = scored("mg_pope", inputs["pope_pred"], [{"label": label} for label in inputs["pope_label"]])
        rates = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1"}
        rates["Yes ratio"] = "yes_ratio"
        return {name: found[key] / 100 for name, key in rates.items()}

    def mme() -> dict[str, Any]:
        columns = inputs["mme"]
        answers = columns["answer"] if "answer" in columns else columns["label"]
        places = zip(columns["category"], columns["image_path"], answers, strict=True)
        gold = [{"category": task, "image": image, "answer": answer} for task, image, answer in places]
        found = scored("mg_mme", columns["prediction"], gold)
        by_task = {task: row["score"] for task, row in found["by_task"].items()}
        return {"perception": found["perception"], "reasoning": found["cognition"], **by_task}

    def textvqa() -> float:
        texts = [entry["pred_answer"] for entry in inputs["textvqa"]]
        gold = [{"answers": list(entry["gt_answers"])} for entry in inputs["textvqa"]]
        return scored("textvqa", texts, gold)["accuracy"] / 100

    yield Example("yes_no", lambda: listed("yes_no", yes_or_no), "yes_no")
    yield Example("choice", lambda: listed("choice", first_letters), "choice")
    yield Example("anls", lambda: listed("anls", lambda pair: distance(*pair)), "anls_distance")
    yield Example("docvqa", lambda: listed("docvqa", docvqa), "docvqa_hits")
    yield Example("pope", pope_rates, "pope")
    yield Example("pope_f1", lambda: pope_rates()["F1 score"], "pope_f1")
    yield Example("mme", mme, "mme")
    yield Example("textvqa", textvqa, "textvqa")


ADAPTERS = {"dialog_encoding": dialog_encoding, "eval_prompts": eval_prompts, "metrics": metrics}
