"""The command `compare`: two models, or two predictions files, on the same questions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llavakit.cli.common import Device, Dtype, Json, Judge, app, assignments, given, print_json, show, writing
from llavakit.cli.evaluation import output_of, scoring
from llavakit.errors import UserError

_WHAT = "Model folder, hub id, predictions file, or a folder with one."


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help=_WHAT)],
    second: Annotated[str, typer.Argument(metavar="B", help=_WHAT)],
    task: Annotated[str, typer.Option(help="Benchmark, for instance pope, scienceqa, textvqa.")],
    questions: Annotated[
        Path | None, typer.Option(help="The benchmark's question file: for models, and for pictures on the page.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: that of the questions.")] = None,
    gold: Annotated[
        Path | None, typer.Option(help="The benchmark's answers; default: the question file, where it holds them.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Page to write; default: runs/compare/TASK/A--B.html.")
    ] = None,
    common: Annotated[
        bool, typer.Option("--common", help="Compare the questions that both answered, where they differ.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: as published.")] = None,
    judge: Judge = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="KEY=VALUE for the scoring.")] = None,
    question_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for reading the questions.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Compare two models on a benchmark: paired differences with intervals and tests.

    A model is asked as `eval` asks it, into the same file; answers that exist are taken. Right and wrong answers are
    tested by McNemar's exact test where every question has its own picture; otherwise answers are exchanged at random,
    picture by picture.

    \b
    Examples:
      llavakit compare runs/a/final runs/b/final --task phantom --questions heldout.jsonl
      llavakit compare a.jsonl b.jsonl --task pope --questions coco_pope_random.json --images val2014
      llavakit compare a.jsonl b.jsonl --task scienceqa --gold gold.jsonl --json
    """
    from llavakit.evaluation.compare import compare as run_compare
    from llavakit.evaluation.compare import tables, verdict
    from llavakit.evaluation.comparison_page import write_page
    from llavakit.evaluation.score import benchmark, checked

    chosen = benchmark(task)
    options = assignments(question_option or ())
    for place in (questions, gold, images):
        if place is not None and not place.exists():
            raise UserError(f"{place}: no such file")
    if gold is None and chosen.questions_are_gold:
        gold = questions
    asked = [] if questions is None else chosen.questions(questions, images, **checked(chosen.questions, options, task))
    asking = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "question_options": options}
    files = [
        _answers(place, task, questions, images, asking, given(device=device, dtype=dtype)) for place in (first, second)
    ]
    found = run_compare(task, files[0], files[1], gold, common=common, options=scoring(option, judge))
    result = found.result()
    page = page or Path("runs", "compare", task, f"{files[0].stem}--{files[1].stem}.html")
    with writing(page):
        write_page(page, found, result, asked)
    if as_json:
        print_json(result | {"verdict": verdict(result), "page": str(page)})
        return
    show(*tables(result))
    print(f"first: {result['first']}\nsecond: {result['second']}\n{verdict(result)}")
    print(f"{len(found.differing())} questions on which they differ: {page}", file=sys.stderr)


def _answers(
    place: str, task: str, questions: Path | None, images: Path | None, asking: dict[str, Any], loading: dict[str, Any]
) -> Path:
    """The predictions file of one side; a model is asked first."""
    from llavakit.evaluation.compare import predictions_in, results_in

    path = Path(place)
    if path.is_file() or (path.is_dir() and results_in(path)):
        return predictions_in(path)
    if path.suffix == ".jsonl":
        raise UserError(f"{place}: no such file")
    if questions is None:
        raise UserError(f"{place}: is asked as a model; give --questions FILE, or name its predictions file")
    import llavakit
    from llavakit.evaluation.run import evaluate

    output = output_of(place, task)
    with writing(output):
        evaluate(llavakit.load(place, **loading), task, questions, output, images=images, scored=False, **asking)
    return output
