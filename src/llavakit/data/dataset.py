"""The dataset that a training loop reads: record in, processed sample out.

It owns what happens to a broken record, and knows neither tokenizer nor pixels: both are behind `encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from llavakit.conversation.messages import Message
from llavakit.data.mixture import Mixture, check_choice
from llavakit.data.records import BadRecords
from llavakit.errors import RecordError, UserError

IGNORE = -100


class SampleDataset(Dataset):
    """Processed samples of a mixture.

    Args:
        records: A `Mixture` or a sequence of `Record`.
        encode: Messages to a processed sample (`LlavakitProcessor.encode`).
        on_bad_record: "stop" raises at a broken record, "skip" notes it and gives the next good one in its place, so
            that batches keep their size and the order of all others.
        bad: Where broken records are noted.
        max_length: Longest sample. A longer one is cut behind its last visual token; one whose visual tokens do
            not fit, or that keeps no label, is a broken record.
        visual_token_id: Id of visual positions; needed to see what a cut would remove.
    """

    def __init__(
        self,
        records: Mixture | Sequence[Any],
        encode: Callable[[list[Message]], Mapping[str, Any]],
        *,
        on_bad_record: str = "stop",
        bad: BadRecords | None = None,
        max_length: int | None = None,
        visual_token_id: int | None = None,
    ) -> None:
        check_choice("on_bad_record", on_bad_record, ("stop", "skip"))
        self.records, self.encode = records, encode
        self.on_bad_record, self.bad = on_bad_record, BadRecords() if bad is None else bad
        self.max_length, self.visual_token_id = max_length, visual_token_id

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The processed sample.

        Raises:
            RecordError: If the record is broken, or with "skip" if all are.
        """
        for step in range(len(self)):
            try:
                return self._sample((index + step) % len(self))
            except RecordError as error:
                if self.on_bad_record == "stop":
                    raise
                self.bad.add(error)
        raise UserError(f"no usable record in the data; {self.bad.report(3)}")

    def _sample(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        try:
            sample = dict(self.encode(record.messages))
        except (UserError, OSError) as error:  # OSError: a file that vanished or is cut off
            raise RecordError(record.file, record.line, "record", str(error)) from error
        self.bad.note(record.file, record.line, (*getattr(record, "notes", ()), *sample.pop("notes", ())))
        return self._cut(sample, record)

    def _cut(self, sample: dict[str, Any], record: Any) -> dict[str, Any]:
        ids, labels = sample["input_ids"], sample["labels"]
        if self.max_length is None or len(ids) <= self.max_length:
            return sample
        visual = [place for place, token in enumerate(ids) if int(token) == self.visual_token_id]
        problem = f"takes {len(ids)} tokens, max_length is {self.max_length}"
        if visual and visual[-1] >= self.max_length:
            raise RecordError(record.file, record.line, "record", f"{problem}, and the cut would go through its media")
        labels = labels[: self.max_length]
        if all(int(label) == IGNORE for label in labels):
            raise RecordError(record.file, record.line, "record", f"{problem}, and no answer is left before the cut")
        return sample | {"input_ids": ids[: self.max_length], "labels": labels}

    def order(self, seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
        """Sample numbers of an epoch, see `Mixture.order`."""
        return self.records.order(seed, epoch, shuffle=shuffle)

    def lengths(self, encode: Callable[[list[Message]], Mapping[str, Any]] | None = None) -> list[int]:
        """Tokens of every sample, negative for text only; for grouping and packing.

        Args:
            encode: A cheaper `encode` that leaves the pixels out; default the dataset's own.
        """
        own, self.encode = self.encode, encode or self.encode
        try:
            samples = (self[index] for index in range(len(self)))
            return [len(s["input_ids"]) * (1 if len(s.get("visual_modalities", ())) else -1) for s in samples]
        finally:
            self.encode = own
