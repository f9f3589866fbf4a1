"""LLaVA-Med's golden components."""

from __future__ import annotations

from llavakit.systems.llava_med import parity_data, parity_model, parity_text

ADAPTERS = {**parity_text.ADAPTERS, **parity_model.ADAPTERS, **parity_data.ADAPTERS}
