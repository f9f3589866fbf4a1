"""Commands of evaluation: `eval` and `score`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llavakit.cli.common import (
    Base,
    Device,
    Dtype,
    Encoder,
    Json,
    Judge,
    Knowledge,
    Model,
    Quantize,
    QuantizeParts,
    RunnerName,
    Search,
    Template,
    WayOptions,
    WayToAnswer,
    app,
    assignments,
    given,
    print_json,
    quantization,
    responder_choice,
    writing,
)
from llavakit.errors import UserError


@app.command("eval")
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="Benchmark, for instance pope, scienceqa, textvqa.")],
    questions: Annotated[Path, typer.Option(help="The benchmark's question file.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: that of the questions.")] = None,
    boxes: Annotated[Path | None, typer.Option(help="Box file of the pictures, by the questions' ids.")] = None,
    gold: Annotated[Path | None, typer.Option(help="The benchmark's answers; without them nothing is scored.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Predictions; default: runs/eval/TASK/FOLDER--MODEL.jsonl.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first N questions only; not scored.")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="K/N", help="Ask the K-th of N parts of the questions only; not scored.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    runner: Annotated[RunnerName, typer.Option(help="ray: workers on this machine or a cluster.")] = RunnerName.local,
    processes: Annotated[int, typer.Option(min=1, help="Workers of Ray, each with the model.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: as published.")] = None,
    judge: Judge = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="KEY=VALUE for the scoring.")] = None,
    question_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for reading the questions.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_parts: QuantizeParts = None,
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    responder: WayToAnswer = None,
    responder_option: WayOptions = None,
    search: Search = None,
    store: Knowledge = None,
    as_json: Json = False,
) -> None:
    """Answer the questions of a benchmark and score the answers.

    Interrupted, the same command asks only what has no answer yet.

    \b
    Examples:
      llavakit eval runs/demo/final --task phantom --questions heldout.jsonl
      llavakit eval MODEL --task pope --questions coco_pope_random.json --images val2014
      llavakit eval MODEL --task scienceqa --questions q.json --gold gold.jsonl --json
      llavakit eval MODEL --task gqa --questions gqa.jsonl --images images --runner ray --processes 8
      llavakit eval MODEL --task critic-pointwise --questions q.jsonl --judge lmms-lab/llava-critic-7b
    """
    from llavakit.evaluation.score import benchmark, print_result

    benchmark(task)
    for place in (questions, gold, images, boxes):
        if place is not None and not place.exists():
            raise UserError(f"{place}: no such file")
    settings = {"score_options": scoring(option, judge), "question_options": assignments(question_option or ())}
    answering = responder_choice(responder, responder_option, search=search, store=store)
    answering |= given(device=device, dtype=dtype, base=base, vision_tower=vision_tower, template=template)
    answering |= quantization(quantize, quantize_parts)
    if processes > 1 and runner is RunnerName.local:
        raise UserError("--processes: several belong to --runner ray; --batch-size makes one process faster")
    import llavakit
    from llavakit.evaluation.run import OnRay
    from llavakit.evaluation.run import evaluate as run_evaluation

    loaded = OnRay(model, processes, **answering) if runner is RunnerName.ray else llavakit.load(model, **answering)
    part = "" if shard is None else f"--{shard.replace('/', '-of-')}"
    output = output or output_of(model, task, part)
    with writing(output):
        result = run_evaluation(
            loaded,
            task,
            questions,
            output,
            images=images,
            boxes=boxes,
            gold=gold,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            limit=limit,
            shard=shard,
            **settings,
        )
    print(f"{result['asked']} questions asked; predictions are in {result['predictions']}", file=sys.stderr)
    if as_json:
        print_json(result)
    elif result["metrics"] is not None:
        print_result(result)


def output_of(model: str, task: str, part: str = "") -> Path:
    """Where the answers of a model to a benchmark are.

    Every finished run is called "final": the folder above it tells them apart.
    """
    name = "--".join(Path(model).resolve().parts[-2:]) if Path(model).exists() else model.replace("/", "--")
    return Path("runs", "eval", task, f"{name}{part}.jsonl")


class ScoreCommands(TyperGroup):
    """`llavakit score`: commands by name; any other first word is the task of `score_task`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [TASK, *args]
        return super().parse_args(ctx, args)


TASK = "TASK"
scores = typer.Typer(
    cls=ScoreCommands,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Score existing predictions: of a benchmark, or written reports.

    \b
    Examples:
      llavakit score pope --predictions answers.jsonl --gold coco_pope_random.json
      llavakit score report --predictions answers.jsonl --references gold.jsonl
    """,
)
app.add_typer(scores, name="score")


@scores.command(TASK)
def score_task(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Benchmark, for instance scienceqa, vqav2, pope.")],
    predictions: Annotated[Path, typer.Option(help='JSONL of {"question_id", "text"}.')],
    gold: Annotated[Path | None, typer.Option(help="The benchmark's answers.")] = None,
    judge: Judge = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="KEY=VALUE of the benchmark.")] = None,
    as_json: Json = False,
) -> None:
    """Score existing predictions of a benchmark.

    \b
    Examples:
      llavakit score scienceqa --predictions answers.jsonl --gold gold.jsonl
      llavakit score pope --predictions answers.jsonl --gold coco_pope_random.json --json
      llavakit score gqa --predictions answers.jsonl --gold gold.jsonl -o missing=wrong
    """
    from llavakit.evaluation.score import print_result
    from llavakit.evaluation.score import score as compute

    print_result(compute(task, predictions, gold, **scoring(option, judge)), as_json)


def scoring(option: list[str] | None, judge: str | None) -> dict[str, Any]:
    """Options of a score; the judge may be named by either option.

    Raises:
        UserError: If both name one.
    """
    found = assignments(option or ())
    if judge is not None and "judge" in found:
        raise UserError("--judge: -o judge= names one too; leave one of them out")
    return found | given(judge=judge)
