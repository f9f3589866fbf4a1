"""The contract of language adapters: modules that run the decoder in another way.

An adapter owns its own parameters and is handed the untouched transformers decoder at every call, so it can be
removed without a trace.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from llavakit.language.rows import DecodingRows, SeparateRows
from llavakit.model.prompt import PromptInfo


@dataclass(frozen=True)
class PrefixKeys:
    """What identifies the states of a prompt, position by position, so that prompts that begin alike can share them.

    Attributes:
        keys: One number per position [length]; equal numbers from the beginning on mean equal states.
        resume: Where computing begins if the states of so many first positions are known [length].
        salt: Part of the keys of the reply's tokens.
    """

    keys: np.ndarray
    resume: np.ndarray
    salt: int

    @classmethod
    def behind(cls, keys: np.ndarray, guides: np.ndarray) -> PrefixKeys:
        """Keys where states also depend on all positions up to a later one, which has to be computed anew.

        Args:
            keys: Content of every position [length].
            guides: For every position the last one that its states depend on, or that the states behind it need
                [length]; equal for neighbours that belong together.
        """
        salted, salt = keys.copy(), 0
        for guide in np.unique(guides):
            content = hashlib.blake2b(keys[: guide + 1].tobytes(), digest_size=7)
            salt = int.from_bytes(content.digest(), "little")
            own = guides == guide
            salted[own] = _mixed(keys[own], salt)
        return cls(salted, np.minimum(np.arange(len(keys)), guides), salt)

    def with_reply(self, ids: np.ndarray) -> np.ndarray:
        """Keys of the prompt and of the reply's tokens behind it."""
        return np.concatenate([self.keys, _mixed(ids, self.salt)])


def _mixed(keys: np.ndarray, salt: int) -> np.ndarray:
    return -1 - (salt ^ keys)


class LanguageAdapter(nn.Module):
    """Base class; subclasses are registered in `llavakit.registry.ADAPTERS`.

    Args:
        text_config: Configuration of the decoder that will be run.
    """

    def __init__(self, text_config: Any) -> None:
        super().__init__()
        self.text_config = text_config

    def check(self, decoder: nn.Module) -> None:
        """Refuse a decoder that the adapter cannot run; called when a model is built.

        Raises:
            UserError: One line.
        """

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

    def prefix_keys(self, keys: np.ndarray, answers: np.ndarray) -> PrefixKeys | None:
        """What identifies the states of a prompt, if prompts that begin alike may share them; None if not (default).

        An adapter that gives keys is filled with shared states through its cache's layers, and its rows define `read`.

        Args:
            keys: Content of every position [length]: a token id, or a number for a media item.
            answers: True at earlier answers and at tokens that the model has generated itself [length].
        """
        return None

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
