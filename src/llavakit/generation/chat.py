"""`llavakit.load`: a checkpoint in any known layout, ready to chat.

model = llavakit.load("runs/demo/final")
print(model.chat([{"role": "user", "content": [{"type": "image", "image": "x.png"},
                                               {"type": "text", "text": "What is this?"}]}]))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llavakit.checkpoints.convert import build, load_processor, local_folder, open_checkpoint
from llavakit.conversation.template import get_template
from llavakit.errors import UserError
from llavakit.generation.engine import Engine
from llavakit.generation.request import Request, RequestHandle, SamplingParams
from llavakit.generation.stopping import before_stop, generate_options, stop_token_ids
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.prompt import PromptInfo
from llavakit.splice.scatter import IGNORE

Messages = Sequence[Mapping[str, Any]]


class Chat:
    """A model with its processor and a generation engine.

    Args:
        model: The network, in evaluation mode.
        processor: Its processor.
        name: What to call it in messages.
        max_batch: Requests that are decoded together.
    """

    def __init__(
        self,
        model: LlavakitForConditionalGeneration,
        processor: LlavakitProcessor,
        name: str = "model",
        max_batch: int = 16,
    ) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.engine = Engine(model, max_batch=max_batch, tokenizer=processor.tokenizer)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def request(self, messages: Messages, **sampling: Any) -> Request:
        """Messages as a request for the engine.

        Args:
            sampling: Fields of `SamplingParams` (`max_new_tokens`, `temperature`, `top_p`, `stop`, `seed`, ...).
        """
        sample = self.processor.encode(messages, add_generation_prompt=True)
        stop = (*_strings(sampling.pop("stop", None)), *get_template(self.processor.template).stop)
        views = sample["pixel_values"]
        return Request(
            input_ids=torch.tensor(sample["input_ids"], device=self.model.device),
            pixel_values=views or None,
            visual_sizes=torch.tensor(sample["visual_sizes"]) if views else None,
            visual_modalities=torch.tensor(sample["visual_modalities"]) if views else None,
            visual_regions=sample["visual_regions"] or None,
            answers=[label != IGNORE for label in sample["labels"]],
            sampling=SamplingParams(stop=stop, eos_token_ids=self.eos_token_ids, **sampling),
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's, those of the generation configuration, and the template's."""
        tokenizer = self.processor.tokenizer
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, (list, tuple)) else [configured]
        ends = stop_token_ids(get_template(self.processor.template).stop, tokenizer)
        return tuple(sorted({i for i in [tokenizer.eos_token_id, *configured, *ends] if i is not None}))

    def submit(self, messages: Messages, **sampling: Any) -> RequestHandle:
        """Queue a conversation; the handle yields text as it is generated."""
        return self.engine.submit(self.request(messages, **sampling))

    def chat(self, messages: Messages, **sampling: Any) -> str:
        """The assistant's next turn."""
        return self.chat_batch([messages], **sampling)[0]

    def chat_batch(self, conversations: Sequence[Messages], **sampling: Any) -> list[str]:
        """The next turn of several conversations, generated together."""
        handles = [self.submit(messages, **sampling) for messages in conversations]
        replies = [handle.result() for handle in handles]
        return [reply.text.strip() for reply in replies]

    def stream(self, messages: Messages, **sampling: Any) -> Iterator[str]:
        """The next turn piece by piece."""
        for piece in self.submit(messages, **sampling):
            if piece.text:
                yield piece.text

    def generate(self, messages: Messages, **options: Any) -> str:
        """The next turn by transformers' `generate`, with all its options (`num_beams`, ...).

        Args:
            options: Of `generate`; `stop` (a string or several) ends the reply as in `chat`.
        """
        request = self.request(messages, stop=options.pop("stop", None))
        tokenizer = self.processor.tokenizer
        inputs: dict[str, Any] = {"input_ids": request.input_ids[None]}
        if request.pixel_values is not None:
            views = request.pixel_values
            inputs["pixel_values"] = torch.stack(views) if len({v.shape for v in views}) == 1 else views
            inputs |= {"visual_sizes": request.visual_sizes, "visual_modalities": request.visual_modalities}
            inputs["visual_regions"] = request.visual_regions
            inputs["prompt_info"] = PromptInfo(torch.tensor(request.answers, device=self.model.device)[None])
        options = generate_options(request.sampling, tokenizer, self.eos_token_ids) | options
        out = self.model.generate(**inputs, **options)
        text = tokenizer.decode(out[0, request.input_ids.shape[0] :], skip_special_tokens=True)
        return before_stop(text, request.sampling.stop).strip()


def _strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    max_batch: int = 16,
) -> Chat:
    """Load a checkpoint: llavakit's own, the authors' layout of a known system, or transformers'.

    Args:
        model: Local folder or hub id.
        base: The language model, for LoRA and connector-only files.
        vision_tower: The encoder, for files that do not contain it.
        dtype: "float32", "bfloat16" or "float16"; default float32 on a CPU, bfloat16 on a GPU.
        device: Default the first GPU if there is one.
        max_batch: Requests that are decoded together.

    Raises:
        UserError: One clear line if the folder is not a model or its tensors do not fit.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch raises one or the other
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({reason}); cpu always can") from None
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    checkpoint = open_checkpoint(model, base=base, vision_tower=vision_tower)
    processor = load_processor(checkpoint, local_folder(base) if base is not None else None)
    net = build(checkpoint, dtype=dtype, device=device)
    return Chat(net, processor, name=str(model), max_batch=max_batch)
