"""The contract of language adapters: modules that run the decoder in another way.

An adapter owns its own parameters and is handed the untouched transformers decoder at every call, so it can be
removed without a trace.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llavakit.language.rows import DecodingRows, SeparateRows
from llavakit.model.prompt import PromptInfo


class LanguageAdapter(nn.Module):
    """Base class; subclasses are registered in `llavakit.registry.ADAPTERS`.

    Args:
        text_config: Configuration of the decoder that will be run.
    """

    def __init__(self, text_config: Any) -> None:
        super().__init__()
        self.text_config = text_config

    def make_cache(self) -> Any:
        """A new, empty transformers `Cache` for generation, or None for the decoder's usual one."""
        return None

    @property
    def max_positions(self) -> int | None:
        """Most positions of prompt and reply that the adapter can run; None leaves the limit to the decoder."""
        return None

    def rows(self, model: Any, states: Any, *, rows: int, max_rows: int, max_length: int) -> DecodingRows:
        """Where the engine keeps requests that are decoded together. The default runs them one after the other.

        Args:
            model: The whole model.
            states: Cache of the first request after prefill.
            rows: Rows to begin with.
            max_rows, max_length: Most rows, and most positions of one.
        """
        return SeparateRows(model)

    def forward(
        self,
        decoder: nn.Module,
        *,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        visual: Tensor | None,
        input_ids: Tensor | None,
        labels: Tensor | None,
        segments: Tensor | None,
        prompt_info: PromptInfo,
        **kwargs: Any,
    ) -> tuple[Any, Tensor | None]:
        """Run the decoder.

        Args:
            decoder: The base model without head (`LlamaModel`, ...).
            visual: True at positions filled by visual tokens [batch, length]; None after the prompt.
            segments: Sample number of every position in packed rows [batch, length], None if not packed.
            prompt_info: What the caller knows of the prompt beside its ids; while text is generated without a cache,
                its `length` is the number of columns that were not generated.
            kwargs: What else the caller of the model passed.

        Returns:
            The decoder's output (`BaseModelOutputWithPast`) and an additional loss term or None.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")
