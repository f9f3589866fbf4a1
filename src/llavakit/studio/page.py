"""The studio's page: pictures, records, training, evaluation, chat, from top to bottom.

The page holds nothing but which project is open. What takes time is a job (`llavakit.studio.jobs`), and what is shown
of it is read from its files every two seconds, so a reload shows the same.
"""

from __future__ import annotations

import functools
import html
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from llavakit.errors import UserError
from llavakit.media import load_image
from llavakit.pages import curve, inline
from llavakit.studio.actions import Studio, same
from llavakit.studio.project import Project, framed, listed

EVERY = 2.0  # seconds between looks at the jobs
CARDS = 24
CSS = """
footer { display: none !important }
.studio-log textarea { font-family: ui-monospace, monospace; font-size: .8rem }
.studio-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .8rem }
.studio-cards > div { border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .6rem;
  overflow-wrap: anywhere }
.studio-cards img { width: 100%; border-radius: .3rem; image-rendering: pixelated }
.studio-curve { --line: var(--border-color-primary); --soft: var(--body-text-color-subdued);
  --accent: var(--color-accent) }
.studio-curve svg { max-width: 36rem; width: 100%; height: auto }
"""


def told(act: Callable[..., Any]) -> Callable[..., Any]:
    """What a user did wrong is shown on the page."""

    @functools.wraps(act)
    def shown(*values: Any) -> Any:
        try:
            return act(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return shown


class Seen:
    """Values for components; `skip` for those that have not changed since the last look of the same browser."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def of(self, name: str, value: Any) -> Any:
        """The value as it is to be returned."""
        if self._last.get(name, self) == value:
            return gr.skip()
        self._last[name] = value
        return value


def build(studio: Studio, *, source: str = "", model: str = "") -> gr.Blocks:
    """The page.

    Args:
        source, model: What the fields hold at first.
    """
    with gr.Blocks(title="llavakit studio", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("## llavakit studio")
        with gr.Row():
            with gr.Column(scale=3):
                place = gr.Textbox(source, label="Folder of pictures, or a CSV, JSON or JSONL of them", autofocus=True)
                start = gr.Textbox(model, label="Model to start from (a folder or hub id; empty: the usual one)")
                make = gr.Button("Make the project", variant="primary")
            with gr.Column(scale=2):
                known = gr.Dropdown(studio.names(), label="Projects", value=None, interactive=True)
                about = gr.HTML()
        gr.Markdown("### Records, as the model sees them")
        number = gr.Number(1, label="Record", minimum=1, precision=0)
        record = gr.HTML()
        gr.Markdown("### Training")
        state = gr.Markdown()
        with gr.Row():
            plan = gr.Button("Plan")
            train = gr.Button("Train", variant="primary")
            stop = gr.Button("Stop", variant="stop")
        loss = gr.HTML(elem_classes="studio-curve")
        with gr.Accordion("Log", open=False):
            log = gr.Textbox(show_label=False, lines=12, max_lines=12, interactive=False, elem_classes="studio-log")
        result = gr.HTML()
        gr.Markdown("### Evaluation on the held-out questions")
        with gr.Row():
            evaluate = gr.Button("Evaluate", variant="primary")
            other = gr.Dropdown([], label="Compare with", interactive=True)
            compare = gr.Button("Compare")
        score = gr.HTML()
        difference = gr.HTML()
        gr.Markdown("### Use")
        with gr.Row():
            serve = gr.Button("Serve", variant="primary")
            end = gr.Button("Stop serving", variant="stop")
        served = gr.HTML()
        with gr.Row():
            asked = gr.Number(1, label="Held-out picture", minimum=1, precision=0)
            question = gr.Textbox(label="Question (empty: the held-out one)", scale=3)
            ask = gr.Button("Ask")
        answer = gr.HTML()

        views = {
            "known": known, "about": about, "state": state, "plan": plan, "train": train, "stop": stop, "loss": loss,
            "log": log, "result": result, "evaluate": evaluate, "other": other, "compare": compare, "score": score,
            "difference": difference, "serve": serve, "end": end, "served": served, "ask": ask,
        }  # fmt: skip

        def look(seen: Seen | None) -> list[Any]:
            seen = seen or Seen()  # the timer may be faster than the page's loading
            found = told(shown)(studio)
            return [seen.of(name, found[name]) for name in views]

        def fresh() -> list[Any]:
            seen = Seen()
            return [seen, *look(seen)]

        def done(act: Callable[..., None]) -> Callable[..., Any]:
            """An action, and then what is to be seen."""

            def run(seen: Seen, *values: Any) -> list[Any]:
                told(act)(*values)
                return look(seen)

            return run

        memory = gr.State(None)
        outputs = list(views.values())
        page.load(fresh, None, [memory, *outputs], show_progress="hidden").then(
            told(functools.partial(record_of, studio)), number, record
        )
        gr.Timer(EVERY).tick(look, memory, outputs, show_progress="hidden", concurrency_limit=None)
        looks = told(functools.partial(record_of, studio))
        make.click(done(studio.make), [memory, place, start], outputs).then(looks, number, record)
        known.input(done(studio.choose), [memory, known], outputs).then(looks, number, record)
        number.change(looks, number, record)
        plan.click(done(studio.plan), memory, outputs)
        train.click(done(studio.train), memory, outputs)
        stop.click(done(lambda: studio.project.job("train").stop()), memory, outputs)
        evaluate.click(done(studio.evaluate), memory, outputs)
        compare.click(done(studio.compare), [memory, other], outputs)
        serve.click(done(studio.serve), memory, outputs)
        end.click(done(lambda: studio.project.job("serve").stop()), memory, outputs)
        gr.on([ask.click, question.submit], told(functools.partial(answer_of, studio)), [asked, question], answer)
    return page


def shown(studio: Studio) -> dict[str, Any]:
    """What every component holds now."""
    if studio.open is None:
        empty = dict.fromkeys(("about", "log", "loss", "result", "score", "difference", "served"), "")
        closed = {
            name: gr.update(interactive=False) for name in ("plan", "train", "evaluate", "compare", "serve", "ask")
        }
        hidden = {name: gr.update(visible=False) for name in ("stop", "end", "other")}
        known = gr.update(choices=studio.names(), value=None)
        return {**empty, **closed, **hidden, "known": known, "state": "Make or open a project first."}
    project = studio.project
    names = studio.names()
    job = project.job("train")
    running, trained = job.state == "running", project.final.is_dir()
    evaluating, comparing = (project.job(name).state == "running" for name in ("eval", "compare"))
    serving = project.job("serve").state == "running"
    label = "Go on" if job.state in ("stopped", "died", "failed") else "Train"
    others = [name for name in names if name != project.name]
    return {
        "known": gr.update(choices=names, value=project.name),
        "about": listed([str(project.folder), *project.facts.get("said", ())]),
        "state": studio.training(),
        "plan": gr.update(interactive=not running),
        "train": gr.update(value=label, interactive=not running and not trained),
        "stop": gr.update(visible=running),
        "loss": "".join(f"<p>{html.escape(name)}</p>{curve(values['log'])}" for name, values in project.stages),
        "log": job.log() or project.job("plan").output(),
        "result": framed(project.page, title="How training went") if trained and project.page else "",
        "evaluate": gr.update(value="Evaluating" if evaluating else "Evaluate", interactive=trained and not evaluating),
        "other": gr.update(choices=others, visible=bool(others)),
        "compare": gr.update(
            value="Comparing" if comparing else "Compare", interactive=trained and not comparing, visible=bool(others)
        ),
        "score": _score(studio),
        "difference": _difference(studio),
        "serve": gr.update(interactive=trained and not serving),
        "end": gr.update(visible=serving),
        "served": _served(studio),
        "ask": gr.update(interactive=serving),
    }


def _score(studio: Studio) -> str:
    job = studio.project.job("eval")
    if job.problem:
        return f"<p>{html.escape(job.problem)}</p>"
    if job.state != "finished":
        return f"<pre>{html.escape(job.log()[-400:])}</pre>" if job.state == "running" else ""
    return _scored(studio.project, (job.folder / "ended.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _scored(project: Project, ended: int) -> str:
    """Score and answers of an evaluation that ended at a time; their pictures are not opened at every look."""
    result = project.score()
    if result is None or result.get("metrics") is None:
        return ""
    lines = []
    for name, value in result["metrics"].items():
        if isinstance(value, (int, float)):
            bounds = (result.get("intervals") or {}).get(name)
            spread = f" (95 % interval {bounds[0]:.1f} to {bounds[1]:.1f})" if bounds else ""
            lines.append(f"{name}: {value:g}{spread}")
    rows = sorted(project.answers(), key=lambda row: same(row["answer"], row["reply"]))  # wrong ones first
    return (
        listed(lines) + '<div class="studio-cards">' + "".join(_card(project, row) for row in rows[:CARDS]) + "</div>"
    )


def _card(project: Project, row: Mapping[str, Any]) -> str:
    said = f"{row['text'].splitlines()[0]}"
    mark = "✓" if same(row["answer"], row["reply"]) else "✗"
    return (
        f"<div>{_pictures(project, row)}<div>{html.escape(said)}</div>"
        f"<b>{mark} {html.escape(row['reply'])}</b><div>truth: {html.escape(row['answer'])}</div></div>"
    )


def _pictures(project: Project, row: Mapping[str, Any]) -> str:
    """Small copies of a question's pictures; of clips and volumes the names."""
    found = []
    for part in project.media(row):
        path = part[part["type"]]
        if part["type"] != "image":
            found.append(f"<div>{html.escape(path)}</div>")
            continue
        found.append(f'<img alt="" src="{inline(load_image(path))}">')
    return "".join(found)


def _difference(studio: Studio) -> str:
    project, job = studio.project, studio.project.job("compare")
    if job.problem:
        return f"<p>{html.escape(job.problem)}</p>"
    path = project.folder / "compare.html"
    if job.state != "finished" or not path.is_file():
        return ""
    return framed(path.read_text(encoding="utf-8"), title="Comparison")


def _served(studio: Studio) -> str:
    job = studio.project.job("serve")
    if job.problem:
        return f"<p>{html.escape(job.problem)}</p>"
    if job.state != "running":
        return ""
    url = studio.address()
    if url is None:
        return "<p>loading the model</p>"
    if studio.host == "0.0.0.0":
        url = url.replace("127.0.0.1", socket.gethostname())  # for a browser elsewhere
    return f'<p>Served at <a href="{url}" target="_blank" rel="noopener">{url}</a> (page and API).</p>'


def record_of(studio: Studio, number: int | None) -> str:
    """A record of the open project, as the model sees it."""
    if studio.open is None or not number:
        return ""
    from llavakit.inspection.model import look_with
    from llavakit.inspection.page import sample_page

    project = studio.project
    seen = look_with(f"{project.folder / 'train.jsonl'}:{int(number)}", str(project.folder / "recipe.yaml"))
    model = "/".join(Path(project.recipe.model or project.name).parts[-2:])
    page = sample_page(seen, f"record {int(number)}", model)
    return framed(page, title=f"Record {int(number)} as the model sees it")


def answer_of(studio: Studio, number: int | None, question: str) -> str:
    """The served model's answer, with the picture that it is about."""
    rows = studio.project.questions
    if not number or number > len(rows):
        raise UserError(f"there are {len(rows)} held-out questions; choose one of them")
    row = rows[int(number) - 1]
    said = studio.ask(int(number), question)
    card = _card(studio.project, {**row, "text": question.strip() or row["text"], "reply": said})
    return f'<div class="studio-cards">{card}</div>'
