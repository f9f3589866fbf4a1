"""Robust CLIP's golden components of prompts, labels and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.conversation.labels import IGNORE
from llavakit.conversation.messages import split_literals
from llavakit.conversation.template import get_template
from llavakit.conversation.tokens import tokenize
from llavakit.data.records import Record
from llavakit.evaluation import processors
from llavakit.evaluation.metrics import answers as metrics
from llavakit.proof.entries import (
    original_ids,
    pope,
    prompt_text,
    scored,
    text_processor,
    with_blank_media,
)
from llavakit.proof.golden import Case, Result, examples, take
from llavakit.proof.verbatim import FIRST_CHARACTER, VERBATIM
from llavakit.registry import TEXT_METRICS
from llavakit.robustness.ensemble import CAPTION_STAGES, THRESHOLDS, WORST, Schedule, success_rate
from llavakit.systems.robust_clip.benchmarks import reply_accuracy, short_reply
from llavakit.systems.robust_clip.open_flamingo import COLON, END
from llavakit.systems.robust_clip.prompts import ANSWER_MARK, messages_for
from llavakit.training.dataset import Samples

COLON_ID, END_ID, IMAGE_ID, PAD_ID = 7, 90, 91, 0  # of the case's toy ids


def prompts_llava(case: Case) -> Any:
    """Prompts of the evaluation and of its attacks."""
    return examples(_llava_prompt, case.inputs["cases"])


def _llava_prompt(given: Mapping[str, Any]) -> dict[str, str]:
    given = take(given)
    dataset, question = given.pop("dataset"), given.pop("question", None)
    answer = given.pop("caption", None) or given.pop("answer", None)
    given.pop("answer", None)
    if given:
        raise ValueError(f"unknown fields {', '.join(given)}")
    messages = _with_marks(messages_for(dataset, None, question, answer))
    prompt = prompt_text("vicuna_v1", messages, placement="keep", add_generation_prompt=not answer)
    # the published code counts the tokens of this text, wherever the mark first stands
    return {"prompt": prompt, "context_only": prompt.split(ANSWER_MARK)[0] + ANSWER_MARK}


def _with_marks(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose texts hold marks of images, which the original's strings do not tell from those it writes."""

    def parts(part: Mapping[str, Any]) -> list[Any]:
        return split_literals(part["text"], {"<image>": "image"}) if part["type"] == "text" else [part]

    return [{**message, "content": [own for part in message["content"] for own in parts(part)]} for message in messages]


def prompts_openflamingo(case: Case) -> Any:
    """OpenFlamingo's prompts with their demonstrations."""
    return examples(_flamingo_prompt, case.inputs["cases"])


def _flamingo_prompt(given: Mapping[str, Any]) -> dict[str, str]:
    task, shots = given["task"], given["num_shots"]
    template = get_template("open_flamingo")
    demonstrations: list[dict[str, Any]] = []
    for demo in given["demos"]:
        asked = _asked(task, demo.get("question") if task == "vqa" else None)
        answer = demo["answer"] if task == "vqa" else demo["caption"].strip()
        demonstrations += [asked, {"role": "assistant", "content": _text(answer)}]
    query = [_asked(task, given.get("question") if task == "vqa" else None)]
    context = template.render(demonstrations)[0] if demonstrations else ""
    if not shots:
        context = context.replace("<image>", "")

    def whole(messages: list[dict[str, Any]]) -> str:
        return context + template.render(messages)[0]

    found = {"prompt": whole(query)}
    if given.get("target") is not None:
        target = {"role": "assistant", "content": _text(given["target"])}
        found["attack_prompt"] = whole([*query, target])
    return found


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


def _asked(task: str, question: str | None) -> dict[str, Any]:
    text = _text(question or "") if task == "vqa" else []
    return {"role": "user", "content": [{"type": "image", "image": None}, *text]}


def labels_openflamingo(case: Case) -> Any:
    """What of a prompt an attack on OpenFlamingo leads to or away from."""
    rows = case.inputs["ids"]
    processor = _toy_processor({token for row in rows for token in row})
    return examples(lambda row: _flamingo_labels(processor, row), rows)


def _toy_processor(ids: set[int]) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = {COLON_ID: COLON, END_ID: END, PAD_ID: "<pad>"}
    letters = {token: names.get(token, chr(FIRST_CHARACTER + token)) for token in ids | set(names)}
    backend = Tokenizer(models.BPE({letter: token for token, letter in letters.items()}, []))
    backend.add_special_tokens([END, "<pad>"])
    processor = text_processor(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>"), VERBATIM)
    processor.letters = letters
    return processor


def _flamingo_labels(processor: Any, row: Sequence[int]) -> list[int]:
    text = "".join("<image>" if token == IMAGE_ID else processor.letters[token] for token in row)
    messages = with_blank_media([{"role": "user", "content": split_literals(text)}])
    options = {"labels": "after_last_colon"}
    sample = processor.encode(messages, **options)
    if any(label != IGNORE for label in sample["labels"]):
        sample = Samples([Record(messages, "case", 1, {})], processor, options=options)[0]
    ids = original_ids(processor, sample["input_ids"])
    if [IMAGE_ID if token == IMAGE_PLACEHOLDER else token for token in ids] != list(row):
        raise ValueError("the messages do not give the row's ids back")
    return [int(label) for label in sample["labels"]]


def tokenizer_image_token(case: Case) -> Any:
    """Ids of prompts with placeholders, by the case's toy tokenizer."""
    prompts = case.inputs["prompts"]
    tokenizer = _word_tokenizer({word for prompt in prompts for word in prompt.replace("<image>", " ").split(" ")})
    return examples(lambda prompt: tokenize(prompt, tokenizer)[0], prompts)


def _word_tokenizer(words: set[str]) -> Any:
    """1, then 5 + (7 * length + code of the first character) % 50 for every word that spaces separate."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    class Toy(PreTrainedTokenizerFast):
        """Words may share ids, which the backend's vocabulary cannot hold."""

        def __call__(self, text: str, **options: Any) -> Any:
            found = super().__call__(text, **options)
            found["input_ids"] = [ids[token] for token in found["input_ids"]]
            return found

    begin, unknown = "\N{START OF TEXT}", "\N{SUBSTITUTE}"  # no words
    vocabulary = {unknown: 0, begin: 1} | {word: n for n, word in enumerate(sorted(words - {""}), start=2)}
    ids = {number: 5 + (7 * len(word) + ord(word[0])) % 50 for word, number in vocabulary.items()} | {1: 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 1)])
    return Toy(tokenizer_object=backend, bos_token=begin)


def vqa_accuracy(case: Case) -> dict[str, Any]:
    """Replies cut, normalised and compared with the annotators."""
    rows = case.inputs["cases"]
    texts, gold = [row["generation"] for row in rows], [list(row["answers"]) for row in rows]
    cut = [short_reply(text) for text in texts]
    found = scored("robust_vqa", texts, [{"answers": answers} for answers in gold])
    return {
        "postprocessed": cut,
        "normalised": [processors.vqa_official_answer(text) for text in cut],
        "per_question": [
            round(100 * reply_accuracy(text, answers), 2) for text, answers in zip(texts, gold, strict=True)
        ],
        "overall": round(found["accuracy"], 2),
    }


def pope_scores(case: Case) -> dict[str, Any]:
    """Answers parsed, counts and rates, and what the published script prints."""
    answers, labels = case.inputs["answers"], case.inputs["labels"]
    parsed = [processors.pope_answer(text) for text in answers]
    counts = pope(answers, labels)
    raw = metrics.binary_metrics(parsed, ["no" if label == "no" else "yes" for label in labels])
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1"}
    lines = ["TP\tFP\tTN\tFN\t", "\t".join(str(counts[name]) for name in ("TP", "FP", "TN", "FN"))]
    lines += [f"{name}: {raw[key]}" for name, key in names.items()]
    lines += [f"Yes ratio: {raw['yes_ratio']}"]
    lines += [", ".join(f"{raw[key]:.3f}" for key in ("f1", "accuracy", "precision", "recall", "yes_ratio"))]
    return {"parsed": parsed, "log": "\n".join(lines) + "\n", "f1": counts["F1 score"]}


def scienceqa(case: Case) -> Any:
    """Letters and the option that each is."""
    options = processors.LETTERS[:5]

    def one(given: Mapping[str, Any]) -> dict[str, Any]:
        letter = processors.scienceqa_letter(given["text"], options) or "FAILED"
        return {"answer": letter, "index": metrics.scienceqa_index(letter, given["n_choices"], list(options))}

    return examples(one, case.inputs["cases"])


def cider(case: Case) -> dict[str, Any]:
    """CIDEr of captions that are tokenised already."""
    refs, hyps = case.inputs["refs"], case.inputs["hyps"]
    found = TEXT_METRICS.get("coco_cider")(hyps, refs)
    return {"cider": found.value, "per_image": list(found.each)}


def targeted_success(case: Case) -> Result:
    """Percentage of captions that say the target."""
    return Result(json=success_rate(case.inputs["target"], case.inputs["captions"]))


def ensemble_schedule(case: Case) -> dict[str, Any]:
    """Who is attacked in which stage, from where and with which reference, given what captions would score."""
    inputs = case.inputs
    names, scores = list(inputs["image_ids"]), inputs["scores"]
    schedule = Schedule(names, CAPTION_STAGES, THRESHOLDS[inputs["dataset"]])
    stages, captions, reloads, half = [], {}, [], True
    calls = 0
    for number, stage in enumerate(schedule.stages):
        jobs = schedule.jobs(number)
        if stage.half != half:
            half = stage.half
            reloads.append([number + 1, "float16" if half else "float32"])
        worst = stage.reference == WORST
        stages.append(
            {
                "stage": number,
                "attack": f"attack_str_cur: {'apgd' if stage.attack else None}, "
                f"precision: {'float16' if stage.half else 'float32'}, "
                f"init: {'prev-best' if worst else 'clean'}, gt: {'prev-best' if worst else stage.reference}",
                "attacked": [
                    {"image": name, "text": f"<cap:gt{job.reference}>", "init_from_stage": job.start}
                    for name, job in jobs.items()
                ]
                if stage.attack
                else [],
            }
        )
        calls += len(jobs)
        schedule.note(number, {name: scores[number][names.index(name)] for name in jobs})
        captions |= {name: f"p{number}_{name}" for name in jobs if schedule.best_stage[name] == number}
        current, best = schedule.mean_last(), schedule.mean_best()
        stages[-1]["after"] = f": {len(schedule.left)} current cider: {current}, best cider: {best}"
    return {
        "stages": stages,
        "best_captions": {str(name): captions[name] for name in names},
        "which_gt": {str(name): schedule.worst_reference[name] for name in names},
        "left_to_attack": {str(name): name not in schedule.broken for name in names},
        "model_reloads": reloads,
    }


ADAPTERS: dict[str, Callable[[Case], Any]] = {
    "prompts_llava": prompts_llava,
    "prompts_openflamingo": prompts_openflamingo,
    "labels_openflamingo": labels_openflamingo,
    "tokenizer_image_token": tokenizer_image_token,
    "vqa_accuracy": vqa_accuracy,
    "pope": pope_scores,
    "scienceqa": scienceqa,
    "cider": cider,
    "targeted_success": targeted_success,
    "ensemble_schedule": ensemble_schedule,
}
