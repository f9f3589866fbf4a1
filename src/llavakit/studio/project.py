"""A project as the page sees it: a folder that `llavakit new` made, its commands, and what they left."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llavakit.data.strict_json import JsonError, parse_json, read_json
from llavakit.errors import UserError
from llavakit.evaluation.records import read_records
from llavakit.studio.jobs import Job
from llavakit.training.recipe import Recipe, load_recipe

FACTS = "project.json"


@dataclass(frozen=True)
class Project:
    """One project.

    Attributes:
        folder: Its folder.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Project:
        """The project in a folder.

        Raises:
            UserError: If `llavakit new` did not make the folder.
        """
        if not (folder / FACTS).is_file():
            raise UserError(f"{folder}: holds no {FACTS}; a folder that `llavakit new` made would be right")
        project = cls(folder)
        project.commands  # noqa: B018  (raises here what would be wrong later)
        return project

    @property
    def name(self) -> str:
        """What it is called on the page."""
        return self.folder.name

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `llavakit new` said about it."""
        return read_json(self.folder / FACTS, kind=dict)

    @cached_property
    def commands(self) -> dict[str, list[str]]:
        """Arguments of `llavakit` by the command's name, as `llavakit new` printed them."""
        try:
            lists = [shlex.split(line)[1:] for line in self.facts["commands"]]
            made = self.facts.get("folder", str(self.folder))  # as it was called from where it was made
            return {words[0]: [self._here(word, made) for word in words] for words in lists}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise UserError(f"{self.folder / FACTS}: commands must be the command lines to go on with") from None

    def _here(self, word: str, made: str) -> str:
        """A word of a command with the project's folder as it is called from here."""
        inside = word == made or word.startswith(f"{made}/")
        return f"{self.folder}{word.removeprefix(made)}" if inside else word

    @cached_property
    def recipe(self) -> Recipe:
        """Its recipe."""
        return load_recipe(self.folder / "recipe.yaml")

    @property
    def final(self) -> Path:
        """The trained model's folder; not there before training has ended."""
        return Path(self.recipe.output) / "final"

    def job(self, name: str) -> Job:
        """The job of a command of this project."""
        return Job(self.folder / "jobs" / name)

    # what the commands left

    @property
    def stages(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and `metrics.json` of every stage that has begun."""
        found = []
        for stage in self.recipe.stages:
            path = Path(self.recipe.output) / stage.name / "metrics.json"
            if path.is_file():
                found.append((stage.name, read_json(path, kind=dict, finite=False)))
        return found

    @property
    def page(self) -> str | None:
        """The page that training wrote at its end."""
        path = Path(self.recipe.output) / "report.html"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    @property
    def questions(self) -> list[dict[str, Any]]:
        """The held-out questions."""
        return [record.data for record in read_records(self.folder / "heldout.jsonl")]

    @property
    def images(self) -> Path:
        """Folder that the pictures of the questions are in."""
        words = self.commands["eval"]
        return Path(words[words.index("--images") + 1])

    def media(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """Media parts of a held-out question."""
        parts = []
        for kind in ("image", "video", "volume"):
            names = row.get(kind)
            for name in names if isinstance(names, list) else [names] if names else []:
                parts.append({"type": kind, kind: str(self.images / name)})
        return parts

    def score(self) -> dict[str, Any] | None:
        """What the evaluation printed: "metrics", "n", "intervals"; None before it has."""
        job = self.job("eval")
        if job.state != "finished":
            return None
        try:
            return parse_json(job.output())
        except JsonError:
            return None

    def answers(self) -> list[dict[str, Any]]:
        """The held-out questions with the model's answers ("reply"); those without one are left out."""
        path = self.folder / "answers.jsonl"
        if not path.is_file():
            return []
        replies = {str(record.data["question_id"]): record.data["text"] for record in read_records(path)}
        rows = self.questions
        return [row | {"reply": replies[str(row["question_id"])]} for row in rows if str(row["question_id"]) in replies]


def projects(workspace: Path) -> list[Project]:
    """The projects in a folder, the latest first."""
    found = [path.parent for path in workspace.glob(f"*/{FACTS}")]
    return [Project(path) for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


def framed(page: str, height: int = 640, title: str = "") -> str:
    """A whole page inside another, where its scripts cannot run."""
    text = html.escape(page, quote=True)
    return (
        f'<iframe sandbox srcdoc="{text}" title="{html.escape(title, quote=True)}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
    )


def listed(lines: Sequence[str]) -> str:
    """Lines as an HTML list."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
