"""The dataset that a training loop reads: record in, processed sample out.

It owns what happens to a broken record, and knows neither tokenizer nor pixels: both are behind `encode`.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from llavakit.conversation.messages import media_of
from llavakit.data.mixture import Mixture, check_choice
from llavakit.data.records import BadRecords, belongs_to
from llavakit.errors import MediaError, RecordError, UserError

IGNORE = -100


class SampleDataset(Dataset):
    """Processed samples of a mixture.

    A record is broken if it cannot be read, if its media, its text or its length do not fit, or if its sample has no
    label: a step of such samples would have nothing to learn.

    Args:
        records: A `Mixture` or a sequence of `Record`.
        encode: Messages to a processed sample (`LlavakitProcessor.encode`).
        on_bad_record: "stop" raises at a broken record, "skip" notes it and gives another sample of the same source
            in its place, so that batches keep their size and the order of all others. Which one depends on `seed` and
            the record's number alone.
        bad: Where broken records are noted.
        max_length: Longest sample. A longer one is cut behind its last visual token; one whose visual tokens do
            not fit is a broken record.
        visual_token_id: Id of visual positions; needed to see what a cut would remove.
        seed: Of the replacements.
        check: What a record must keep to instead (`check_sample`); then `max_length` and `visual_token_id` are its
            business.
        whole_records: Whether `encode` takes the record and not its messages.
    """

    def __init__(
        self,
        records: Mixture | Sequence[Any],
        encode: Callable[[Any], Mapping[str, Any]],
        *,
        on_bad_record: str = "stop",
        bad: BadRecords | None = None,
        max_length: int | None = None,
        visual_token_id: int | None = None,
        seed: int = 0,
        check: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None,
        whole_records: bool = False,
    ) -> None:
        check_choice("on_bad_record", on_bad_record, ("stop", "skip"))
        self.records, self.encode = records, encode
        self.on_bad_record, self.bad = on_bad_record, BadRecords() if bad is None else bad
        self.check = check or functools.partial(check_sample, max_length=max_length, visual_token_id=visual_token_id)
        self.whole_records, self.seed = whole_records, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The processed sample.

        Raises:
            RecordError: If the record is broken.
            UserError: With "skip", if all records of its source are.
        """
        return self.sample(index)

    def sample(self, index: int, encode: Callable[[Any], Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """The processed sample by another `encode`, such as one that leaves the pixels out."""
        for candidate in self._candidates(index):
            try:
                return self.made(candidate, encode or self.encode)
            except RecordError as error:
                if self.on_bad_record == "stop":
                    raise
                self.bad.add(error)
        raise self._exhausted(index)

    def record(self, index: int) -> Any:
        """The record of a sample, or the one that takes its place because it cannot be read.

        Raises:
            RecordError, UserError: See `__getitem__`.
        """
        for candidate in self._candidates(index):
            try:
                return self.records[candidate]
            except RecordError as error:
                if self.on_bad_record == "stop":
                    raise
                self.bad.add(error)
        raise self._exhausted(index)

    def _exhausted(self, index: int) -> UserError:
        return UserError(f"no usable record in the source of {self.place(index)[0]}; {self.bad.report(3)}")

    def _candidates(self, index: int) -> Iterator[int]:
        """The record itself, then all others of its source in an order of their own."""
        yield index
        same = getattr(self.records, "same_source", lambda _: range(len(self)))(index)
        draw = random.Random(f"{self.seed} {index}")
        begin, step = draw.randrange(len(same)), draw.randrange(1, len(same) + 1)
        while math.gcd(step, len(same)) != 1:  # a step that has a divisor in common would not reach all
            step = draw.randrange(1, len(same) + 1)
        for number in range(len(same)):
            other = same[(begin + number * step) % len(same)]
            if other != index:
                yield other

    def place(self, index: int) -> tuple[str, int]:
        """File and line of a record."""
        if hasattr(self.records, "place"):
            return self.records.place(index)
        record = self.records[index]
        return record.file, record.line

    def made(self, index: int, encode: Callable[[Any], Mapping[str, Any]]) -> dict[str, Any]:
        """The processed sample of this very record.

        Raises:
            RecordError: If it is broken.
        """
        record = self.records[index]
        with belongs_to(record.file, record.line):
            try:
                sample = dict(encode(record if self.whole_records else record.messages))
            except MediaError as error:
                said = " ".join(str(error).split())
                raise RecordError(record.file, record.line, media_field(record), said) from error
        self.bad.note(record.file, record.line, (*getattr(record, "notes", ()), *sample.pop("notes", ())))
        return self.check(sample, record)

    def order(self, seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
        """Sample numbers of an epoch, see `Mixture.order`."""
        return self.records.order(seed, epoch, shuffle=shuffle)

    def lengths(self, encode: Callable[[Any], Mapping[str, Any]] | None = None) -> list[int]:
        """Tokens of every sample, negative for text only; for grouping and packing.

        Args:
            encode: A cheaper `encode` that leaves the pixels out; default the dataset's own.
        """
        samples = (self.sample(index, encode) for index in range(len(self)))
        return [len(s["input_ids"]) * (1 if len(s.get("visual_modalities", ())) else -1) for s in samples]


def check_sample(
    sample: dict[str, Any], record: Any, max_length: int | None = None, visual_token_id: int | None = None
) -> dict[str, Any]:
    """The sample of a conversation, cut to `max_length` behind its last visual token.

    Raises:
        RecordError: If it has no label, or the cut would go through its media or leave no label.
    """
    ids, labels = sample["input_ids"], sample["labels"]
    if not _supervised(labels):
        raise RecordError(record.file, record.line, "record", "no answer is left to learn: its labels are masked")
    if max_length is None or len(ids) <= max_length:
        return sample
    problem = f"takes {len(ids)} tokens, max_length is {max_length}"
    visual = [place for place, token in enumerate(ids) if int(token) == visual_token_id]
    if visual and visual[-1] >= max_length:
        said = f"{problem}, and the cut would go through its media, which take {len(visual)} of them"
        raise RecordError(record.file, record.line, media_field(record), said)
    labels = labels[:max_length]
    if not _supervised(labels):
        raise RecordError(record.file, record.line, "record", f"{problem}, and no answer is left before the cut")
    kept = {name: sample[name][:max_length] for name in ("input_ids", "label_weights") if name in sample}
    return sample | kept | {"labels": labels}


def media_field(record: Any) -> str:
    """The field of a record that its media stand in: their modality if they have one in common."""
    modalities = {part["type"] for part in media_of(getattr(record, "messages", ()))}
    return modalities.pop() if len(modalities) == 1 else "record"


def _supervised(labels: Sequence[int]) -> bool:
    """Whether a label counts; the first one never does, since nothing comes before it."""
    return any(int(label) != IGNORE for label in labels[1:])
