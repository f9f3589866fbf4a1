"""Training data in stages, written by a teacher that knows the answer, and checked: generate, verify, retry, refuse.

A record's answers are replaced one after the other. A reply without a conclusion, or whose conclusion the verifier
does not find equal to the standard answer, is asked for again; after the last attempt the question is left out and its
record noted as refused. A record without any question left is not written. Source: spec section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llavakit.systems.llava_o1.stages import sections

ATTEMPTS, VERDICT_TOKENS = 2, 300
INSTRUCTION = (
    "I have an image and a question that I want you to answer. I need you to strictly follow the format with four "
    "specific "
    "sections: SUMMARY, CAPTION, REASONING, and CONCLUSION. It is crucial that you adhere to this structure exactly as "
    "outlined and that the final answer in the CONCLUSION matches the standard correct answer precisely. To explain "
    "further: In SUMMARY, briefly explain what steps you'll take to solve the problem. In CAPTION, describe the "
    "contents "
    "of the image, specifically focusing on details relevant to the question. In REASONING, outline a step-by-step "
    "thought "
    "process you would use to solve the problem based on the image. In CONCLUSION, give the final answer in a direct "
    "format, and it must match the correct answer exactly. If it's a multiple choice question, the conclusion should "
    "only "
    "include the option without repeating what the option is. Here's how the format should look: <SUMMARY> [Summarize "
    "how "
    "you will approach the problem and explain the steps you will take to reach the answer.] </SUMMARY> <CAPTION> "
    "[Provide "
    "a detailed description of the image, particularly emphasizing the aspects related to the question.] </CAPTION> "
    "<REASONING> [Provide a chain-of-thought, logical explanation of the problem. This should outline step-by-step "
    "reasoning.] </REASONING> <CONCLUSION> [State the final answer in a clear and direct format. It must match the "
    "correct "
    "answer exactly.] </CONCLUSION> (Do not forget </CONCLUSION>!) Please apply this format meticulously to analyze "
    "the "
    "given image and answer the related question, ensuring that the answer matches the standard one perfectly."
)
_VERIFY = (
    "Evaluate whether the assistant's response is valid. Respond with 'valid' if the assistant's response is not a "
    "refusal "
    "and it aligns with the standard answer in meaning. Respond with 'invalid' if the response is a refusal or "
    "differs from "
    "the standard answer in a meaningful way.A refusal means the assistant states it cannot recognize a specific "
    "person/object or refuses to answer the question. Do not consider a response to be a refusal just because it "
    "includes "
    "the word 'no' or other negative terms."
)

Ask = Callable[[str | None, Sequence[str]], str]  # (image, texts) -> reply


def teacher_texts(question: str, answer: str, hints: Sequence[str] = ()) -> list[str]:
    """Texts of the request to a teacher, behind the picture."""
    texts = [INSTRUCTION, f"Question: {question}\n", f"Standard answer: {answer}"]
    return [*texts, "".join(f"\nHint: {hint}" for hint in hints)] if hints else texts


def verifier_text(answer: str, conclusion: str) -> str:
    """The request to a verifier."""
    return f"{_VERIFY}Standard answer: {answer}Assistant's response: {conclusion}"


def staged_reply(
    question: str, answer: str, image: str, hints: Sequence[str], teacher: Ask, verifier: Ask
) -> str | None:
    """A verified reply in stages; None if every attempt failed."""
    for _ in range(ATTEMPTS):
        reply = teacher(image, teacher_texts(question, answer, hints))
        conclusion = sections(reply)["CONCLUSION"]
        if conclusion is None:
            continue
        if "invalid" not in verifier(None, [verifier_text(answer, conclusion)]).lower():
            return reply
    return None


def staged_record(record: Mapping[str, Any], teacher: Ask, verifier: Ask) -> tuple[dict[str, Any] | None, bool]:
    """A record with answers in stages, and whether a question was refused; None if no question is left."""
    kept, answers, refused = [], 0, False
    for turn in record["conversations"]:
        if turn["from"] != "gpt":
            kept.append(turn)
            continue
        question = kept.pop()
        text = question["value"].replace("<image>\n", "").replace("\n<image>", "")
        reply = staged_reply(text, turn["value"], record["image"], record.get("hints") or (), teacher, verifier)
        if reply is None:
            refused = True
            continue
        answers += 1
        kept += [question | {"value": text}, turn | {"value": reply}]
    return (dict(record) | {"conversations": kept} if answers else None), refused


def staged_records(
    records: Iterable[Mapping[str, Any]],
    teacher: Ask,
    verifier: Ask,
    *,
    has_image: Callable[[str], bool],
    done: Iterable[Mapping[str, Any]] = (),
    refused: Iterable[Any] = (),
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Records in stages, those that were made before first, and the ids of refused ones.

    Args:
        has_image: Whether an image file exists; records without one are left out.
        done, refused: What an earlier run made; their ids are skipped.
    """
    made, ids = list(map(dict, done)), list(refused)
    known = {record["id"] for record in made} | set(ids)
    for record in records:
        if record["id"] in known or not record.get("image") or not has_image(record["image"]):
            continue
        found, failed = staged_record(record, teacher, verifier)
        known.add(record["id"])
        if failed:
            ids.append(record["id"])
        if found is not None:
            made.append(found)
    return made, ids
