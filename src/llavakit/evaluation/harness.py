"""EleutherAI's lm-evaluation-harness with models of llavakit: its tasks, asked through llavakit's own engine.

    python -m llavakit.evaluation.harness --model llavakit --model_args pretrained=FOLDER --tasks medqa_4options \\
        --apply_chat_template

    lm_eval.simple_evaluate(HarnessModel(llavakit.load("FOLDER")), tasks=[...], apply_chat_template=True)

With `--apply_chat_template` a context is the conversation itself, written with the model's template and scored as
`Responder.score` scores it; without it a context is plain text. Options of one question share one prompt. Needs the
extra `harness`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

import llavakit
from llavakit.errors import UserError
from llavakit.generation.responder import Responder


class Conversation(str):
    """A rendered conversation that knows its messages.

    Attributes:
        messages: OpenAI-style.
    """

    messages: list[dict[str, Any]]

    @classmethod
    def of(cls, messages: Sequence[dict[str, Any]], text: str) -> Conversation:
        """Messages with their text."""
        found = cls(text)
        found.messages = list(messages)
        return found


@register_model("llavakit")
class HarnessModel(LM):
    """A responder that ranks given replies, as the harness's model.

    Args:
        pretrained: A responder, or what `llavakit.load` takes.
        options: Further arguments of `llavakit.load`.

    Raises:
        UserError: If there is no such model.
    """

    def __init__(self, pretrained: str | Responder, batch_size: Any = None, device: str | None = None, **options: Any):
        super().__init__()
        if not isinstance(pretrained, Responder):
            options.pop("max_batch_size", None)
            more = {} if device is None else {"device": device}
            pretrained = llavakit.load(pretrained, **more, **options)
        self.model = pretrained

    @property
    def tokenizer_name(self) -> str:
        """Part of the names of the harness's caches."""
        return self.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What results are said to have been made with."""
        template = getattr(getattr(self.model, "processor", None), "template", None)
        return str(getattr(template, "name", template) or "the model's own")

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Messages as a context.

        Raises:
            UserError: If the reply has begun; that is told by the continuation here.
        """
        if not add_generation_prompt:
            raise UserError("harness: a task that begins the assistant's turn (gen_prefix) is not run here")
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in chat_history)
        return Conversation.of(chat_history, text)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation, and whether greedy decoding would write it."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda number: _key(requests[number].args[0]))
        for _, group in groupby(order, key=lambda number: _key(requests[number].args[0])):
            numbers = list(group)
            context = requests[numbers[0]].args[0]
            scores = self.model.score(
                getattr(context, "messages", context), [requests[number].args[1] for number in numbers]
            )
            for number, score in zip(numbers, scores, strict=True):
                found[number] = (score.sum, bool(score.likeliest))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not offered.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "harness: perplexity of whole texts is not measured; choose tasks that rank options or generate"
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies to conversations.

        Raises:
            UserError: If a context is plain text.
        """
        replies = []
        for request in requests:
            context, options = request.args
            if not isinstance(context, Conversation):
                raise UserError("harness: generation needs the chat template; add --apply_chat_template")
            until = options.get("until") or ()
            sampled = bool(options.get("do_sample")) and float(options.get("temperature") or 0) > 0
            answer = self.model.submit(
                context.messages,
                stream=False,
                stop=(until,) if isinstance(until, str) else tuple(until),
                max_new_tokens=int(options.get("max_gen_toks", 256)),
                temperature=float(options["temperature"]) if sampled else 0.0,
                top_p=float(options.get("top_p", 1.0)) if sampled else 1.0,
            ).result()
            replies.append(answer.content)
        return replies


def _key(context: str) -> str:
    messages = getattr(context, "messages", None)
    return hashlib.sha256(repr((messages, str(context))).encode()).hexdigest()


def main() -> None:
    """The harness's command line, which knows llavakit's models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
