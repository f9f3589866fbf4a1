"""Golden cases run again in variations whose right answer follows from the recorded one, or from another run.

Every variation applies to every case of every system; where it cannot, the case itself says why: the reason is computed
from its inputs, outputs and configuration, never listed.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from parity_entries import GOLDEN, cases_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit.proof.golden import Case, Comparison, Result, find_adapter, plain, results, run_case

DTYPES = (torch.float64, torch.float16, torch.bfloat16)


class DoesNotApply(Exception):
    """Why a variation means nothing for a case."""


@dataclass
class Given:
    """The files of a golden case, expected outputs included."""

    folder: Path

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        file = self.folder / f"{name}.safetensors"
        return load_file(file) if file.is_file() else {}

    def json(self, name: str) -> Any:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    @property
    def tolerance(self) -> tuple[float, float]:
        found = self.meta.get("tolerance") or {}
        return float(found.get("atol", 0)), float(found.get("rtol", 0))


Files = dict[str, Any]  # file name without suffix "inputs.safetensors" -> content; None removes it


@contextmanager
def varied(given: Given, files: Files) -> Iterator[Path]:
    """A copy of a case, without its siblings, in which files have other content."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / given.folder.parent.name / given.folder.name
        shutil.copytree(given.folder, folder)
        for name, content in files.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            elif name.endswith(".json"):
                (folder / name).write_text(json.dumps(content))
            else:
                save_file({key: tensor.contiguous().clone() for key, tensor in content.items()}, folder / name)
        yield folder


def against_expected(given: Given, files: Files) -> str:
    """What is wrong with a varied case that holds its own expected outputs."""
    with varied(given, files) as folder:
        report = run_case(folder, [GOLDEN])
    if report.status == "declined":
        raise DoesNotApply("the component is declined")
    return "" if report.status == "passed" else report.reason


def against_another_run(given: Given, files: Files, others: Files, atol: float, rtol: float) -> str:
    """What differs between the results of two variations of a case."""
    with varied(given, others) as folder:
        wanted = results(folder, [GOLDEN])
    with varied(given, files) as folder:
        found = results(folder, [GOLDEN])
    for name, other in wanted.items():
        comparison = Comparison(atol, rtol, found.get(name, Result()))
        for key, tensor in other.tensors.items():
            comparison.tensor(key, tensor.detach())
        if other.json is not None:
            comparison.structure(plain(comparison.result.json), plain(other.json))
        if comparison.differences:
            return f"{name}: {comparison.differences[0]}" if name else comparison.differences[0]
    return ""


# Types


def floats(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.is_floating_point() for tensor in tensors.values())


def cast(tensors: Mapping[str, Tensor], *dtypes: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in one type after the other."""
    found = dict(tensors)
    for dtype in dtypes:
        found = {name: t.to(dtype) if t.is_floating_point() else t for name, t in found.items()}
    return found


def inputs_in_another_type(given: Given, dtype: torch.dtype) -> str:
    """Inputs in another type give what the same numbers give in float32."""
    inputs = given.tensors("inputs")
    if not floats(inputs):
        raise DoesNotApply("no floating-point input")
    slack = max(4 * torch.finfo(dtype).eps, 1e-6)
    atol, rtol = (max(own, slack) for own in given.tolerance)
    same = {"inputs.safetensors": cast(inputs, dtype, torch.float32)}
    return against_another_run(given, {"inputs.safetensors": cast(inputs, dtype)}, same, atol, rtol)


def weights_in_another_type(given: Given, dtype: torch.dtype) -> str:
    """Weights of double precision change nothing; of half precision, rounding alone where nothing is decided."""
    weights = given.tensors("weights")
    if not floats(weights):
        raise DoesNotApply("no weights")
    if dtype == torch.float64:
        atol, rtol = given.tolerance  # the recorded numbers are of single precision
        meta = given.meta | {"tolerance": {"atol": 2 * atol, "rtol": 2 * rtol}}
        return against_expected(given, {"weights.safetensors": cast(weights, dtype), "case.json": meta})
    same = {"weights.safetensors": cast(weights, dtype, torch.float32)}
    with varied(given, same) as folder:
        wanted = results(folder, [GOLDEN])
    with varied(given, {"weights.safetensors": cast(weights, dtype)}) as folder:
        found = results(folder, [GOLDEN])
    outputs = given.tensors("outputs")
    decides = given.json("outputs") is not None or any(not tensor.is_floating_point() for tensor in outputs.values())
    for name, other in wanted.items():
        for key, tensor in other.tensors.items():
            own = found[name].tensors[key]
            if own.shape != tensor.shape:
                return f"{key}: shape {list(own.shape)}, expected {list(tensor.shape)}"
            if decides or not tensor.is_floating_point():
                continue
            off = float((own.double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-6))
            if off > 0.1:
                return f"{key}: off by {off:.0%} of its norm"
    return ""


def another_padding_embedding(given: Given) -> str:
    """The embedding of the padding id is nowhere seen."""
    weights, inputs = given.tensors("weights"), given.tensors("inputs")
    if any(name.startswith("call") for name in given.tensors("outputs")):
        raise DoesNotApply("outputs lie where the inputs lie, and a placeholder is read as the padding id")
    tables = [name for name in weights if name.endswith("embed_tokens.weight")]
    ids = [tensor for name, tensor in inputs.items() if name.endswith("input_ids")]
    if not tables or not ids:
        raise DoesNotApply("no table of embeddings, or no ids")
    masks = {name: tensor for name, tensor in inputs.items() if name.endswith("attention_mask")}
    real = [own if own.shape not in [m.shape for m in masks.values()] else own[_mask(masks, own)] for own in ids]
    if any(bool((own == 0).any()) for own in real):
        raise DoesNotApply("the padding id is a token of the text too")
    if not any("lm_head" in name for name in weights):
        raise DoesNotApply("the table of embeddings is the head as well")
    for name in tables:
        weights[name] = weights[name].clone()
        weights[name][0] = 1000.0
    return against_expected(given, {"weights.safetensors": weights})


def _mask(masks: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    return next(mask for mask in masks.values() if mask.shape == ids.shape).bool()


# Rows


def rows_of(given: Given) -> int:
    """Rows of a batch: the first dimension that all inputs share.

    Raises:
        DoesNotApply: If inputs or outputs do not go by rows.
    """
    inputs, outputs = given.tensors("inputs"), given.tensors("outputs")
    if not inputs:
        raise DoesNotApply("no tensors")
    if not outputs:
        raise DoesNotApply("no output tensors")
    if nested(given.json("inputs")):
        raise DoesNotApply("lists of inputs go with the tensors")
    counts = {tensor.shape[0] if tensor.dim() else 0 for tensor in inputs.values()} - {1}
    rows = counts.pop() if counts else 1
    if counts:
        raise DoesNotApply("the inputs have different first dimensions, so they share no rows")
    if rows == 0 or all(tensor.dim() < 2 for tensor in inputs.values()):
        raise DoesNotApply("inputs have no rows")
    ids = inputs.get("input_ids")
    if ids is not None and len(ids) == rows:
        media = (ids < 0).sum(1)
        if len(inputs) > 1 and not bool((media == 1).all()) and _by_media(inputs):
            raise DoesNotApply("a row has no media item of its own")
    patch = given.meta["config"].get("im_patch_token")  # images in place, as their tokens
    batches = [tensor for name, tensor in inputs.items() if name.endswith("/input_ids")]
    if patch is not None and not all(bool((own == patch).any(1).all()) for own in batches):
        raise DoesNotApply("a row has no media item of its own")
    if any(tensor.dtype == torch.uint8 and tensor.dim() == 3 for tensor in inputs.values()):
        raise DoesNotApply("a picture's first dimension is its height")
    if not by_rows(outputs, rows):
        raise DoesNotApply("no output goes by rows")
    return rows


def nested(value: Any) -> bool:
    """Whether a JSON object holds lists of other things than numbers."""
    lists = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(own, (list, dict)) and own and not is_sequence(own) for own in lists)


def is_sequence(value: Any) -> bool:
    """Whether a JSON value is a list of numbers."""
    return isinstance(value, list) and all(isinstance(entry, (int, float)) for entry in value)


def _by_media(inputs: Mapping[str, Tensor]) -> bool:
    return any(tensor.dim() > 2 for tensor in inputs.values())


def by_rows(outputs: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Outputs with one entry per row."""
    return {n: t for n, t in outputs.items() if t.dim() > 1 and t.shape[0] == rows and "grad" not in n}


def again_and_reversed(given: Given) -> str:
    """A batch, and behind it the same batch backwards: every row gives what it gave."""
    rows = rows_of(given)

    def twice(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.cat([t, t.flip(0)]) if t.shape[0] == rows else t for n, t in tensors.items()}

    inputs, outputs = twice(given.tensors("inputs")), by_rows(given.tensors("outputs"), rows)
    if rows == 1:  # an output of one entry may be one per row, or one in all
        with varied(given, {"inputs.safetensors": inputs}) as folder:
            found = {name: t for result in results(folder, [GOLDEN]).values() for name, t in result.tensors.items()}
        whole = {name: t for name, t in outputs.items() if name in found and len(found[name]) == 1}
        if len(whole) == len(outputs):
            return "no output has become two"
        return rows_changed(given, inputs, {**twice(outputs), **whole})
    return rows_changed(given, inputs, twice(outputs))


def first_row_alone(given: Given) -> str:
    """A batch of one row of many."""
    rows = rows_of(given)
    if rows == 1:
        raise DoesNotApply("a batch of one already")
    inputs = given.tensors("inputs")
    first = {n: t[:1] if t.shape[0] == rows else t for n, t in inputs.items()}
    outputs = {n: t[:1] for n, t in by_rows(given.tensors("outputs"), rows).items()}
    return rows_changed(given, first, outputs)


def rows_changed(given: Given, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> str:
    files = {"inputs.safetensors": inputs, "outputs.safetensors": outputs, "outputs.json": None}
    return against_expected(given, files)


# Records

Path_ = tuple[str, ...]


def record_lists(value: Any, path: Path_ = (), depth: int = 1) -> Iterator[tuple[Path_, list[Any]]]:
    """The lists of a JSON file, or the file itself; without those inside of lists."""
    if isinstance(value, list):
        yield path, value
    elif isinstance(value, dict) and len(path) < depth:
        for key, item in value.items():
            yield from record_lists(item, (*path, key), depth)


def records_of(given: Given) -> tuple[dict[Path_, list[Any]], dict[Path_, list[Any]]]:
    """Lists of records of the inputs, and those of the outputs that have one entry per record.

    Raises:
        DoesNotApply: If there are none.
    """
    inputs, outputs = given.json("inputs"), given.json("outputs")
    if inputs is None:
        raise DoesNotApply("no inputs.json")
    if getattr(find_adapter(Case.read(given.folder)), "ordered", False):
        raise DoesNotApply("by its definition, the place of a record decides about it")
    lists = {path: own for path, own in record_lists(inputs) if len(own) > 1}
    if not lists:
        raise DoesNotApply("the inputs are no list")
    if all(is_sequence(own) for own in lists.values()):
        raise DoesNotApply("numbers of one sequence, no records")
    if given.tensors("inputs"):
        raise DoesNotApply("lists of inputs go with the tensors")
    answers = dict(record_lists(outputs))
    named = {path: own for path, own in lists.items() if len(answers.get(path, ())) == len(own)}
    length = len(max((named or lists).values(), key=len))
    same = named or {path: own for path, own in lists.items() if len(own) == length}
    if len({type(entry) for own in same.values() for entry in own if entry is not None}) > 1:
        raise DoesNotApply("several lists of inputs refer to each other")
    others = [key for key, own in inputs.items() if (key,) not in same and own] if isinstance(inputs, dict) else []
    if not named and any(isinstance(inputs[key], (list, dict)) for key in others):
        raise DoesNotApply("several lists of inputs refer to each other")
    lengths = set(map(len, named.values())) or {length}
    answers = {path: own for path, own in answers.items() if len(own) in lengths}
    if any(nested_length(own, length) for own in answers.values()):
        raise DoesNotApply("outputs are lists of runs over the records")
    if not answers:
        raise DoesNotApply("no output has one entry per record")
    return same, answers


def nested_length(entries: list[Any], length: int) -> bool:
    """Whether every entry holds a list of a length itself."""
    return all(
        isinstance(entry, dict) and any(isinstance(own, list) and len(own) == length for own in entry.values())
        for entry in entries
    )


def replaced(value: Any, lists: Mapping[Path_, list[Any]], change: Callable[[list[Any]], list[Any]]) -> Any:
    """A JSON value with some of its lists changed."""
    if () in lists:
        return change(value)
    return {key: change(item) if (key,) in lists else item for key, item in value.items()}


def records_permuted(given: Given, change: Callable[[list[Any]], list[Any]]) -> str:
    """Records in another order, or twice: every record gives what it gave."""
    inputs, outputs = records_of(given)
    whole = given.json("outputs")
    if len(change([0, 0])) > 2 and () not in outputs and len(outputs) < len(whole):
        raise DoesNotApply("other outputs count the records")
    files = {
        "inputs.json": replaced(given.json("inputs"), inputs, change),
        "outputs.json": replaced(given.json("outputs"), outputs, change),
    }
    return against_expected(given, files)


def twice_backwards(records: list[Any]) -> list[Any]:
    return records[::-1] * 2


# Named runs


def runs_of(given: Given) -> list[str]:
    """Names of runs that inputs.json holds, if outputs go by the same names.

    Raises:
        DoesNotApply: If it holds something else.
    """
    inputs, outputs = given.json("inputs"), given.json("outputs")
    if not isinstance(inputs, dict) or not all(isinstance(run, dict) for run in inputs.values()):
        raise DoesNotApply("the inputs are no named runs")
    names = outputs if isinstance(outputs, dict) else {name.split("/")[0] for name in given.tensors("outputs")}
    if len(inputs) < 2 or not set(inputs) <= set(names):
        raise DoesNotApply("the outputs do not go by the names of runs")
    return list(inputs)


def named_runs(given: Given, choose: Callable[[list[str]], list[str]]) -> str:
    """Named runs in another order, or some of them alone."""
    inputs, outputs, tensors = given.json("inputs"), given.json("outputs"), given.tensors("outputs")
    names = choose(runs_of(given))
    files: Files = {"inputs.json": {name: inputs[name] for name in names}}
    if isinstance(outputs, dict):
        files["outputs.json"] = {name: outputs[name] for name in names}
    if tensors:
        kept = {key: tensor for key, tensor in tensors.items() if key.split("/")[0] in names}
        files["outputs.safetensors"] = kept or None
    given_tensors = given.tensors("inputs")
    if given_tensors:
        if len(names) < len(inputs) and any(key.split("/")[0] not in inputs for key in given_tensors):
            raise DoesNotApply("runs share the case's tensors")
        others = set(inputs) - set(names)
        files["inputs.safetensors"] = {key: t for key, t in given_tensors.items() if key.split("/")[0] not in others}
    return against_expected(given, files)


# Padding and cuts


def setting(config: Any, word: str) -> Path_:
    """Where the configuration has its only key that ends with a word.

    Raises:
        DoesNotApply: If it has none, or several.
    """

    def search(value: Any, path: Path_ = ()) -> Iterator[Path_]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from [(*path, key)] if key.endswith(word) else search(item, (*path, key))

    found = list(search(config))
    if len(found) != 1:
        raise DoesNotApply(f"the configuration has {len(found) or 'no'} {word}")
    return found[0]


def with_setting(meta: Any, path: Path_, value: Any) -> Any:
    changed = json.loads(json.dumps(meta))
    inner = changed["config"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def value_at(config: Any, path: Path_) -> Any:
    for key in path:
        config = config[key]
    return config


def padded_on_the_other_side(given: Given) -> str:
    """Every row of the outputs moved to the other end of its padding."""
    place = setting(given.meta["config"], "padding_side")
    outputs = given.tensors("outputs")
    masks = [tensor for name, tensor in outputs.items() if "attention_mask" in name]
    if not masks:
        raise DoesNotApply("no output says what is padding")
    named = given.json("outputs")
    if isinstance(named, dict) and any("position" in name for name in named):
        raise DoesNotApply("outputs name positions in the rows")
    mask = masks[0].bool()
    right = (value_at(given.meta["config"], place) or "right") == "right"
    shifts = [int((~row).sum()) * (1 if right else -1) for row in mask]

    def moved(name: str, tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != mask.shape or name.startswith("call"):
            return tensor
        return torch.stack([row.roll(shift, 0) for row, shift in zip(tensor, shifts, strict=True)])

    files = {
        "case.json": with_setting(given.meta, place, "left" if right else "right"),
        "outputs.safetensors": {name: moved(name, tensor) for name, tensor in outputs.items()},
    }
    return against_expected(given, files)


def inputs_padded_in_front(given: Given) -> str:
    """Padding of the input rows in front of them: the original strips it wherever it is."""
    inputs = given.tensors("inputs")
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or mask is None:
        raise DoesNotApply("no attention mask among the inputs")
    if any(name.startswith("call") for name in given.tensors("outputs")) or not bool((ids < 0).any()):
        raise DoesNotApply("outputs lie where the inputs lie")
    rows = mask.bool()
    shifts = [int((~row).sum()) for row in rows]

    def moved(tensor: Tensor) -> Tensor:
        if tensor.shape != ids.shape:
            return tensor
        return torch.stack([row.roll(shift, 0) for row, shift in zip(tensor, shifts, strict=True)])

    return against_expected(given, {"inputs.safetensors": {name: moved(t) for name, t in inputs.items()}})


def cut_inside_media(given: Given) -> str:
    """Rows cut in the middle of a media item keep the values of what is left."""
    place = setting(given.meta["config"], "max_length")
    inputs, outputs = given.tensors("inputs"), given.tensors("outputs")
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2:
        raise DoesNotApply("no batch of rows")
    by_position = {n: t for n, t in outputs.items() if re.search("^logits|inputs_embeds|attention_mask|labels", n)}
    if not any("embeds" in name for name in by_position):
        raise DoesNotApply("no embeddings among the outputs, so positions cannot be told apart")
    longest = next(iter(by_position.values())).shape[1]
    media = (ids < 0).nonzero()
    if not len(media):
        raise DoesNotApply("no media item")
    row, first = media[0].tolist()
    tokens = (longest - ids.shape[1] + int((ids[row] < 0).sum())) // max(int((ids[row] < 0).sum()), 1)
    if tokens < 2:
        raise DoesNotApply("a media item is one token")
    length = first + tokens // 2
    files = {
        "case.json": with_setting(given.meta, place, length),
        "outputs.safetensors": {name: tensor[:, :length] for name, tensor in by_position.items()},
        "outputs.json": None,
    }
    return against_expected(given, files)


VARIATIONS: dict[str, Callable[[Given], str]] = {
    **{f"inputs of {str(d).removeprefix('torch.')}": partial(inputs_in_another_type, dtype=d) for d in DTYPES},
    **{f"weights of {str(d).removeprefix('torch.')}": partial(weights_in_another_type, dtype=d) for d in DTYPES},
    "another embedding of padding": another_padding_embedding,
    "batch again and reversed": again_and_reversed,
    "first row alone": first_row_alone,
    "records reversed": partial(records_permuted, change=lambda records: records[::-1]),
    "records reversed and doubled": partial(records_permuted, change=twice_backwards),
    "named runs reversed": partial(named_runs, choose=lambda names: names[::-1]),
    "last named run alone": partial(named_runs, choose=lambda names: names[-1:]),
    "padded on the other side": padded_on_the_other_side,
    "inputs padded in front": inputs_padded_in_front,
    "cut inside a media item": cut_inside_media,
}


def variations(system: str, names: Sequence[str] = tuple(VARIATIONS)) -> Iterator[tuple[str, str | None, str]]:
    """Case and variation, what is wrong (empty if nothing is), and why it does not apply."""
    for folder in cases_of(system):
        given = Given(folder)
        for name in names:
            try:
                yield f"{folder.name}, {name}", VARIATIONS[name](given), ""
            except DoesNotApply as reason:
                yield f"{folder.name}, {name}", None, str(reason)
            except Exception as error:  # one variation that breaks an adapter stops no other
                yield f"{folder.name}, {name}", f"{type(error).__name__}: {error}".splitlines()[0], ""
