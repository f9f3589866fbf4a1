"""The command line: parses arguments, calls the library, prints.

Nothing heavy is imported until a command runs. A mistake of the user is one line on standard error and exit status 2.
Machine-readable output goes to standard output alone, so that it can be piped.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llavakit.errors import UserError

if TYPE_CHECKING:
    from llavakit.proof.golden import Report

app = typer.Typer(
    name="llavakit",
    help="Train, ask, check, compare and serve the models of the LLaVA family.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub id.")]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="Name of a system; `llavakit systems` lists them.")]
Judge = Annotated[str | None, typer.Option(help="Model that reviews answers: a folder, hub id, address or API model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, mps. Default: the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: what fits the device.")]
Base = Annotated[str | None, typer.Option(help="Language model of a LoRA or connector-only checkpoint.")]
Encoder = Annotated[str | None, typer.Option(help="Encoder of a checkpoint that does not contain it.")]
Template = Annotated[
    str | None, typer.Option(help="Chat template instead of the model's own; `tokenizer` is the one in its files.")
]
WayToAnswer = Annotated[
    str | None,
    typer.Option(help="System in whose way to answer, or module:factory; plain is the model alone. Default: its own."),
]
Search = Annotated[
    str | None,
    typer.Option(help="Search over replies, of a responder that has it: best-of-n, sentence, stage, swires."),
]
WayOptions = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the responder; may be repeated.")
]


_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


class Form(StrEnum):
    """Layouts that a checkpoint can be written in."""

    llavakit = "llavakit"
    hf = "hf"
    original = "original"


class Engine(StrEnum):
    """What runs the model."""

    native = "native"
    vllm = "vllm"


class Check(StrEnum):
    """How many records are opened before training begins."""

    sample = "sample"
    all = "all"


class OnBadRecord(StrEnum):
    """What to do with a broken record."""

    stop = "stop"
    skip = "skip"


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the library's defaults apply to the others."""
    return {name: value for name, value in options.items() if value is not None}


def _assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments, the values read as YAML.

    Raises:
        UserError: If one has no `=`, or its value is not YAML.
    """
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{pair}: not an assignment; write key=value")
        try:
            found[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{pair}: the value is not YAML") from None
    return found


def _answering(responder: str | None, options: Sequence[str] | None, search: str | None = None) -> dict[str, Any]:
    """What `llavakit.load` is told of the responder; `--search` is its option of that name.

    Raises:
        UserError: If the search is given twice.
    """
    found = _assignments(options or ())
    if search is not None and "search" in found:
        raise UserError("--search: --responder-option search= says it too; leave one of them out")
    return _given(responder=responder, responder_options=found | _given(search=search) or None)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A disk that is full while `path` is written is reported under its name; the system does not say it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def _print(*renderables: Any) -> None:
    from rich.console import Console

    console = Console(soft_wrap=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    for item in renderables:
        console.print(item)


def _version(wanted: bool) -> None:
    if wanted:
        import llavakit

        print(f"llavakit {llavakit.__version__}")
        raise typer.Exit


@app.callback()
def overview(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Train, ask, check, compare and serve the models of the LLaVA family.

    \b
    Start here:
      llavakit doctor
      llavakit systems
      llavakit chat MODEL --image photo.jpg --prompt "What is this?"
    """


@app.command()
def chat(
    model: Model,
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL; may be repeated.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video file; may be repeated.")] = None,
    volume: Annotated[
        list[str] | None, typer.Option(help="NIfTI or .npy file, or DICOM folder; may be repeated.")
    ] = None,
    processor: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="How media are read, as reading.volume.fill=-1000; may be repeated."),
    ] = None,
    boxes: Annotated[
        list[str] | None, typer.Option(help="Box file of the images, by their names without suffix; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message; default: the template's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 or not given: always the likeliest token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this share of probability.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    responder: WayToAnswer = None,
    responder_option: WayOptions = None,
    search: Search = None,
) -> None:
    """Ask a model about pictures, once or in a conversation.

    In a conversation, /image FILE attaches an image to the next message, /reset forgets, /exit leaves.

    \b
    Examples:
      llavakit chat runs/demo/final --image scan.png --prompt "Is there an effusion?"
      llavakit chat llava-hf/llava-1.5-7b-hf --image a.jpg --image b.jpg
      llavakit chat MODEL --image a.jpg --responder llava-o1 --search stage
      llavakit chat MODEL --video clip.mp4 --processor sampling.type=rate --processor sampling.fps=2
      echo "What is in the picture?" | llavakit chat MODEL --image a.jpg
    """
    from llavakit.cli.terminal import Session, attachment, interact, with_boxes

    places = [("image", image), ("video", video), ("volume", volume)]
    attached = [attachment(kind, place) for kind, given in places for place in given or ()]
    attached = with_boxes(attached, boxes or ())
    settings = _given(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    answering = _answering(responder, responder_option, search)
    import llavakit

    loaded = llavakit.load(
        model,
        **_given(device=device, dtype=dtype, base=base, vision_tower=vision_tower, template=template),
        **answering,
    )
    if processor:
        loaded.configure(_assignments(processor))
    session = Session(loaded, settings, system)
    session.attached = attached
    if prompt is not None:
        session.say(prompt)
    else:
        interact(session)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of parts, data and stages.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values by dotted path.")
    ] = None,
    on_bad_record: Annotated[
        OnBadRecord | None, typer.Option(help="Stop at a broken record, or skip it and list it at the end.")
    ] = None,
    check: Annotated[
        Check, typer.Option(help="Records that are opened before the first step: some of every source, or all.")
    ] = Check.sample,
) -> None:
    """Train a model through the stages of a recipe.

    After a kill, the same command continues where training was. Prints the folder of the finished model.

    \b
    Examples:
      llavakit train recipe.yaml
      llavakit train recipe.yaml output=runs/mine stages.1.epochs=2 stages.1.learning_rate=1e-5
      torchrun --nproc-per-node 8 -m llavakit.cli train recipe.yaml stages.tune.shard=true
    """
    from llavakit.training.run import train as run_training

    extra = [f"on_bad_record={on_bad_record}"] if on_bad_record else []
    result = run_training(recipe, [*(overrides or ()), *extra], check=check.value)
    for stage in result.stages:
        print(f"{stage.name}: {'trained' if stage.ran else 'was finished before'}, {stage.folder}", file=sys.stderr)
    print(result.final)


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
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: as published.")] = None,
    judge: Judge = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="KEY=VALUE for the scoring.")] = None,
    question_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for reading the questions.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    responder: WayToAnswer = None,
    responder_option: WayOptions = None,
    search: Search = None,
    as_json: Json = False,
) -> None:
    """Answer the questions of a benchmark and score the answers.

    Interrupted, the same command asks only what has no answer yet.

    \b
    Examples:
      llavakit eval runs/demo/final --task phantom --questions heldout.jsonl
      llavakit eval MODEL --task pope --questions coco_pope_random.json --images val2014
      llavakit eval MODEL --task scienceqa --questions q.json --gold gold.jsonl --json
      llavakit eval MODEL --task critic-pointwise --questions q.jsonl --judge lmms-lab/llava-critic-7b
    """
    from llavakit.evaluation.score import benchmark, print_result

    benchmark(task)
    for place in (questions, gold, images, boxes):
        if place is not None and not place.exists():
            raise UserError(f"{place}: no such file")
    # Every finished run is called "final": the folder above it tells them apart.
    name = "--".join(Path(model).resolve().parts[-2:]) if Path(model).exists() else model.replace("/", "--")
    settings = {"score_options": _scoring(option, judge), "question_options": _assignments(question_option or ())}
    answering = _answering(responder, responder_option, search)
    import llavakit
    from llavakit.evaluation.run import evaluate as run_evaluation

    loaded = llavakit.load(
        model,
        **_given(device=device, dtype=dtype, base=base, vision_tower=vision_tower, template=template),
        **answering,
    )
    part = "" if shard is None else f"--{shard.replace('/', '-of-')}"
    output = output or Path("runs", "eval", task, f"{name}{part}.jsonl")
    with _writing(output):
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
        _print_json(result)
    elif result["metrics"] is not None:
        print_result({"task": task, "metrics": result["metrics"]})


@app.command()
def score(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Benchmark, for instance scienceqa, vqav2, pope.")],
    predictions: Annotated[Path, typer.Option(help='JSONL of {"question_id", "text"}.')],
    gold: Annotated[Path | None, typer.Option(help="The benchmark's answers.")] = None,
    judge: Judge = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="KEY=VALUE of the benchmark.")] = None,
    as_json: Json = False,
) -> None:
    """Score existing predictions.

    \b
    Examples:
      llavakit score scienceqa --predictions answers.jsonl --gold gold.jsonl
      llavakit score pope --predictions answers.jsonl --gold coco_pope_random.json --json
      llavakit score gqa --predictions answers.jsonl --gold gold.jsonl -o missing=wrong
    """
    from llavakit.evaluation.score import print_result
    from llavakit.evaluation.score import score as compute

    print_result(compute(task, predictions, gold, **_scoring(option, judge)), as_json)


def _scoring(option: list[str] | None, judge: str | None) -> dict[str, Any]:
    """Options of a score; the judge may be named by either option.

    Raises:
        UserError: If both name one.
    """
    found = _assignments(option or ())
    if judge is not None and "judge" in found:
        raise UserError("--judge: -o judge= names one too; leave one of them out")
    return found | _given(judge=judge)


@app.command()
def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder or hub id, in any known layout.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    to: Annotated[Form, typer.Option(help="hf is what transformers and vLLM read; original is the paper's own.")],
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    exchange_vision_tower: Annotated[
        bool,
        typer.Option("--exchange-vision-tower", help="Put --vision-tower in place of the encoder in SRC."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another layout.

    \b
    Examples:
      llavakit convert liuhaotian/llava-v1.5-7b mine --to llavakit --vision-tower openai/clip-vit-large-patch14-336
      llavakit convert lora-folder mine --to llavakit --base lmsys/vicuna-7b-v1.5
      llavakit convert runs/demo/final exported --to hf
    """
    from llavakit.checkpoints.convert import convert as run_conversion

    sources = _given(base=base, vision_tower=vision_tower, template=template)
    done = run_conversion(src, dst, to=to.value, exchange_vision_tower=exchange_vision_tower, **sources)
    if as_json:
        _print_json(done)
    else:
        print(f"{src} ({done['from']}) -> {dst} ({done['to']}), {done['tensors']} tensors")
        for note in done["notes"]:
            print(f"note: {note}", file=sys.stderr)
        if not done.get("tokenizer", True):
            print("no tokenizer was found, so none was written; name one with --base", file=sys.stderr)


@app.command()
def boxes(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Records or questions, a picture, or a folder of them.")
    ],
    detector: Annotated[str, typer.Option(help="Folder or hub id of OWLv2, Grounding DINO or another of their kind.")],
    out: Annotated[Path, typer.Option(help="The box file, .jsonl; an interrupted one is continued.")],
    tags: Annotated[
        str | None, typer.Option(help="What to look for, 'dog, red car'; default: the record's tags or question.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures; default: that of SOURCE.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score of a box.")] = 0.2,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="What to do with a broken record.")] = OnBadRecord.stop,
    device: Device = None,
) -> None:
    """Find objects in pictures, and write a box file for training, eval and chat.

    \b
    Examples:
      llavakit boxes mix.json --images data --detector google/owlv2-large-patch14-ensemble --out boxes.jsonl
      llavakit boxes photos --tags "person, cup, red car" --detector IDEA-Research/grounding-dino-base --out b.jsonl
    """
    from llavakit.checkpoints.identity import model_identity
    from llavakit.checkpoints.opening import local_folder
    from llavakit.data.detection import jobs_of, write_boxes
    from llavakit.generation.load import check_device
    from llavakit.vision.detection import Detector

    jobs = iter(list(jobs_of(source, images=images, tags=tags)))  # what is wrong with the records is said first
    folder = local_folder(detector)
    settings = {"detector": model_identity(folder), "threshold": threshold, "tags": tags}
    find = Detector.load(folder, threshold=threshold, device=check_device(device))
    with _writing(out):
        done = write_boxes(jobs, find, out, settings=settings, on_bad_record=on_bad_record.value)
    more = f", {done['kept']} were there" if done["kept"] else ""
    without = f", {done['without']} records have no picture" if done["without"] else ""
    print(f"{out}: boxes of {done['found']} pictures{more}{without}", file=sys.stderr)
    if done["bad"]:
        print(done["bad"].report(), file=sys.stderr)


@app.command()
def inspect(model: Model, base: Base = None, vision_tower: Encoder = None, as_json: Json = False) -> None:
    """Show what a checkpoint consists of.

    Parts, parameters by part, template, tokens per image; weights are not read.

    \b
    Examples:
      llavakit inspect runs/demo/final
      llavakit inspect llava-hf/llava-1.5-7b-hf --json
    """
    from llavakit.checkpoints.inspect import inspect_model

    facts = inspect_model(model, **_given(base=base, vision_tower=vision_tower))
    if as_json:
        _print_json(facts)
        return
    from rich.table import Table

    head = Table(show_header=False, box=None, pad_edge=False)
    for name in ("folder", "layout", "system", "template"):
        head.add_row(name, str(facts[name] or "-"))
    if facts["adapter"]:
        head.add_row("adapter on", facts["adapter"])
    parts = Table("part", "type", title=f"{facts['parameters']:,} parameters", title_justify="left")
    parts.add_column("parameters", justify="right")
    for part in facts["parts"]:
        parts.add_row(part["name"], part["type"] or "-", f"{part['parameters']:,}")
    tokens = Table("modality", "size", "planner", title="visual tokens of some media", title_justify="left")
    tokens.add_column("views", justify="right")
    tokens.add_column("tokens", justify="right")
    for row in facts["tokens"]:
        size = " x ".join(map(str, row["size"]))
        tokens.add_row(row["modality"], size, row["planner"], str(row["views"]), str(row["tokens"]))
    _print(head, parts, tokens)


@app.command("systems")
def list_systems(
    slug: Annotated[str | None, typer.Argument(metavar="[SLUG]", help="Show all about one system.")] = None,
    as_json: Json = False,
) -> None:
    """List the published systems, or show one.

    \b
    Examples:
      llavakit systems
      llavakit systems llava-1.5
      llavakit systems --json
    """
    from llavakit.cli import catalogue
    from llavakit.system import get_system, systems

    cards = sorted(systems().values(), key=lambda card: card.slug) if slug is None else [get_system(slug)]
    if as_json:
        rows = [catalogue.facts(card) for card in cards]
        _print_json(rows if slug is None else rows[0])
    elif slug is None:
        _print(catalogue.table(cards))
    else:
        print(catalogue.page(cards[0]))


@app.command()
def parity(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Golden cases, or folders of them.")],
    only: Annotated[str | None, typer.Option(metavar="SLUG", help="Only cases of this system.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show where an adapter raised.")] = False,
    as_json: Json = False,
) -> None:
    """Recompute golden cases and compare.

    One line per case; exit status 1 if one fails.

    \b
    Examples:
      llavakit parity tests/golden
      llavakit parity path/to/golden --only llava-1.5
      llavakit parity path/to/golden/llava-1.5/projector --json
    """
    from llavakit.proof.golden import run_parity, summary

    reports = []
    for report in run_parity(paths, only):
        reports.append(report)
        if not as_json:
            print(_line(report), flush=True)
        if trace and report.traceback:
            print(report.traceback, file=sys.stderr)
    result = summary(reports)
    if as_json:
        _print_json(result)
    else:
        print(f"{result['passed']} passed, {result['failed']} failed, {result['declined']} declined")
    if result["failed"]:
        raise typer.Exit(1)


def _line(report: Report) -> str:
    colours = {"passed": "green", "failed": "red", "declined": "yellow"}
    status = f"{report.status:9}"
    if sys.stdout.isatty():
        status = typer.style(status, fg=colours[report.status])
    error = "" if report.max_abs_error is None else f"{report.max_abs_error:.1e}"
    line = f"{status} {report.component:28} {error:8} {report.path}"
    return f"{line}: {report.reason}" if report.reason else line


@app.command()
def cost(slug: Slug, as_json: Json = False) -> None:
    """Count FLOPs, visual tokens and cache bytes.

    At published size, beside the paper's claim.

    \b
    Examples:
      llavakit cost llava-1.5
      llavakit cost llava-1.5 --json
    """
    from llavakit.system import get_system

    report = get_system(slug).load("cost")()
    if as_json:
        _print_json(report.to_dict())
    else:
        _print(report.table())


@app.command()
def reproduce(
    slug: Slug,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; default: the miniature's own.")] = None,
    as_json: Json = False,
) -> None:
    """Re-test a paper's main claim with tiny models.

    Ends with a verdict: supported, not supported or inconclusive.

    \b
    Examples:
      llavakit reproduce llava-1.5
      llavakit reproduce llava-1.5 --seeds 5 --json
    """
    from llavakit.system import get_system

    chosen = _given(seeds=range(seeds) if seeds else None)
    verdict = get_system(slug).load("miniature")(**chosen, progress=lambda line: print(line, file=sys.stderr))
    if as_json:
        _print_json(verdict.to_dict())
    else:
        _print(verdict.table())


@app.command()
def phantom(
    world: Annotated[str, typer.Argument(metavar="WORLD", help="thorax, scene, procedure.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the world.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of cases (patients, scenes).")] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same data.")] = 0,
    as_json: Json = False,
) -> None:
    """Write data of a procedural world.

    Media, records in LLaVA's format, and the truth about every case.

    \b
    Examples:
      llavakit phantom thorax data/thorax --n 1000 --seed 0
      llavakit phantom scene data/scene --n 200 --seed 7 size=64
    """
    options = _assignments(assignments or ())
    from llavakit.phantom.write import write_world

    with _writing(out):
        manifest = write_world(world, out, n=n, seed=seed, **options)
    if as_json:
        _print_json(manifest)
    else:
        counts = ", ".join(f"{count} {name}" for name, count in manifest["counts"].items())
        print(f"{out}: {counts}{' (was there already)' if manifest['reused'] else ''}")


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="video_instruct, surgical_dialogues, ...")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Annotations or records: a file or a folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Records to write: .json or .jsonl.")],
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the preparation.")
    ] = None,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="What to do with a broken record.")] = OnBadRecord.stop,
    as_json: Json = False,
) -> None:
    """Make training records of annotations or of other people's files.

    What a model was asked is kept beside OUT; interrupted, the same command goes on.

    \b
    Examples:
      llavakit prepare video_instruct VideoInstruct100K.json train.json suffix=.mp4
      llavakit prepare surgical_dialogues cholec80 dialogues.jsonl teacher=http://localhost:8000/v1
    """
    options = _assignments(assignments or ())
    from llavakit.data.preparation import prepare as run_preparation

    with _writing(output):
        found = run_preparation(name, source, output, on_bad_record=on_bad_record.value, **options)
    if as_json:
        _print_json(found)
        return
    left_out = found.pop("left_out")
    print(f"{output}: {', '.join(f'{value} {key}' for key, value in found.items())}")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    engine: Annotated[Engine, typer.Option(help="vllm replaces this process by `vllm serve`.")] = Engine.native,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: its folder's name.")] = None,
    web: Annotated[bool, typer.Option(help="Serve the web app too.")] = True,
    api_key: Annotated[list[str] | None, typer.Option(help="Key that clients must send; may be repeated.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="Name that clients call the server by.")] = None,
    origin: Annotated[list[str] | None, typer.Option(help="Origin of a web page that may call the API.")] = None,
    media_folder: Annotated[list[Path] | None, typer.Option(help="Folder that file:// URLs may name.")] = None,
    media_network: Annotated[list[str] | None, typer.Option(help="Network to fetch from although not public.")] = None,
    fetch: Annotated[bool, typer.Option(help="Fetch media by http(s) URL.")] = True,
    max_batch: Annotated[int, typer.Option(min=1, help="Replies decoded together.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    responder: WayToAnswer = None,
    responder_option: WayOptions = None,
    extra: Annotated[list[str] | None, typer.Option(help="Argument for `vllm serve`; may be repeated.")] = None,
) -> None:
    """Serve a model: OpenAI's API and a web app.

    Media come as data URLs, uploads, or from public addresses; nothing a client names is a path.

    \b
    Examples:
      llavakit serve runs/demo/final
      llavakit serve liuhaotian/llava-v1.5-7b --host 0.0.0.0 --api-key $KEY
      llavakit serve exported-hf --engine vllm --extra=--tensor-parallel-size=2
    """
    from llavakit.serving.run import serve as run_server

    options = _given(device=device, dtype=dtype, base=base, vision_tower=vision_tower, template=template, name=name)
    options |= _answering(responder, responder_option)
    run_server(
        model,
        host=host,
        port=port,
        engine=engine.value,
        web=web,
        api_keys=tuple(api_key or ()),
        allowed_hosts=tuple(allowed_host or ()),
        origins=tuple(origin or ()),
        media_folders=tuple(media_folder or ()),
        media_networks=tuple(media_network or ()),
        fetch=fetch,
        max_batch=max_batch,
        max_queue=max_queue,
        extra=tuple(extra or ()),
        **options,
    )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this installation.

    Versions, devices and extras, and what to install where something is missing.

    \b
    Examples:
      llavakit doctor
      llavakit doctor --json
    """
    from llavakit.cli.doctor import examine, table

    report = examine()
    if as_json:
        _print_json(report)
    else:
        _print(table(report))
    if report["problems"]:
        raise typer.Exit(1)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Mistakes of the user end as one line on standard error and status 2; set LLAVAKIT_DEBUG=1 to see where they arose.
    """
    try:
        return app(arguments, standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone, so no message can reach it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage; click's class or typer's copy of it
            error.show()
            return error.exit_code
        line = _user_line(error)
        if line is None or os.environ.get("LLAVAKIT_DEBUG"):
            raise
        print(f"llavakit: {line}", file=sys.stderr)
        return 2


def _user_line(error: Exception) -> str | None:
    """What to tell the user, or None if the fault is ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return f"{error.filename or 'output'}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        from llavakit.cli.doctor import extra_with

        extra = extra_with(error.name.partition(".")[0])
        return extra and f"this needs {error.name}: pip install 'llavakit[{extra}]'"
    return None


def main() -> None:
    """Entry point of the `llavakit` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for programmers
    sys.exit(run())


if __name__ == "__main__":
    main()
