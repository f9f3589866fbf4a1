"""Hooks of mkdocs.yml: the pages that lie outside `docs/`, the reference of the public modules, and the navigation.

Pages are written for the repository, where links lead to files. On the site a link to a page of the repository leads to
that page, a link to a folder with a page to its page, and a link to any other file becomes its name in the text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
SYSTEMS = ROOT / "src" / "llavakit" / "systems"
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
}
"""Pages outside `docs/`, by where they are on the site; every system's page is added."""
SECTIONS = {
    "Start": ("first-hour.md", "studio.md", "coming-from.md", "recipes.md", "data.md", "checkpoints.md"),
    "Use": ("generation.md", "evaluation.md", "serving.md", "tools.md", "retrieval.md", "editing.md", "robustness.md"),
    "Extend": ("architecture.md", "adding-a-system.md", "phantom.md", "contributing.md"),
    "About": ("decisions.md", "security.md", "benchmarks.md", "changelog.md"),
}
"""Pages by section, in the order in which one would read them; a page that is in none stands at the end of Use."""
PARTS = (
    *("conversation", "views", "vision", "connectors", "splice", "language", "model", "generation"),
    *(
        "media",
        "data",
        "training",
        "evaluation",
        "checkpoints",
        "serving",
        "retrieval",
        "tools",
        "editing",
        "robustness",
    ),
    *("synthesis", "phantom", "proof"),
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def title(text: str) -> str:
    return re.search(r"^# (.+)", text, re.M)[1]


def origins() -> dict[str, str]:
    """Where every page lies in the repository, by where it is on the site."""
    found = {there: here for here, there in ELSEWHERE.items()}
    found |= {page.name: f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))}
    for page in sorted(SYSTEMS.glob("*/README.md")):
        found[f"systems/{page.parent.name}.md"] = str(page.relative_to(ROOT))
    return found


ORIGINS = origins()
PLACES = {here: there for there, here in ORIGINS.items()}


def redirected(text: str, page: str) -> str:
    """A page's text with the links of the repository made links of the site."""
    folder = (ROOT / ORIGINS[page]).parent

    def link(found: re.Match[str]) -> str:
        picture, shown, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if re.match(r"\w+:", target) or not path:
            return found[0]
        there = Path(os.path.normpath(folder / path))
        if not there.exists():
            return found[0]  # the strict build names it
        there = there / "README.md" if (there / "README.md").exists() else there
        name = str(there.relative_to(ROOT))
        place = PLACES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        if place is None:
            return shown
        relative = os.path.relpath(place, Path(page).parent)
        return f"{picture}[{shown}]({relative}{hash_}{anchor})"

    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    # links whose text is code are links, links inside code are not
    text = re.sub(r"^(```+).*?^\1$", keep, text, flags=re.M | re.S)
    text = LINK.sub(link, text)
    return re.sub(r"\0(\d+)\0", lambda found: kept[int(found[1])], text)


def on_config(config: Any) -> Any:
    """The navigation."""
    placed = {page for pages in SECTIONS.values() for page in pages}
    there = [page for page in ORIGINS if "/" not in page and page != "index.md"]
    nav: list[Any] = [{"llavakit": "index.md"}]
    for section, pages in SECTIONS.items():
        rest = [page for page in there if page not in placed] if section == "Use" else []
        nav.append({section: [page for page in (*pages, *rest) if page in ORIGINS]})
    systems = [page for page in ORIGINS if page.startswith("systems/")]
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    systems.sort(key=lambda page: table.find(f"(src/llavakit/{page.removesuffix('.md')})"))
    titles = [{title((ROOT / ORIGINS[page]).read_text(encoding="utf-8")): page} for page in systems]
    nav.insert(3, {"Systems": titles})
    nav.insert(5, {"Reference": ["reference/index.md", *(f"reference/{part}.md" for part in PARTS)]})
    config["nav"] = nav
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages outside `docs/`, and those of the reference."""
    for place, origin in ORIGINS.items():
        if not origin.startswith("docs/"):
            files.append(File.generated(config, place, content=(ROOT / origin).read_text(encoding="utf-8")))
    for name, content in reference().items():
        files.append(File.generated(config, name, content=content))
    return files


def summary(module: Path) -> str:
    """The first line of a module's docstring."""
    found = re.match(r'"""(.+?)(?:\n\n|""")', module.read_text(encoding="utf-8"), re.S)
    return " ".join(found[1].split()) if found else ""


def reference() -> dict[str, str]:
    """The pages of the reference: a page for each part of the core, and a list of them."""
    package = ROOT / "src" / "llavakit"
    rows = [f"| [`llavakit.{part}`]({part}.md) | {summary(package / part / '__init__.py')} |" for part in PARTS]
    top = "\n\n".join(f"::: llavakit.{name}" for name in ("registry", "system", "errors"))
    head = "# Reference\n\nFrom the docstrings. `llavakit.load` is [`llavakit.generation.load.load`][]."
    pages = {"reference/index.md": "\n".join([head, "\n| package | |\n|---|---|", *rows, "\n", top])}
    for part in PARTS:
        modules = [module for module in sorted((package / part).rglob("*.py")) if not module.name.startswith("__main")]
        names = [".".join(module.relative_to(package.parent).with_suffix("").parts) for module in modules]
        text = [f"# {part}\n\n{summary(package / part / '__init__.py')}"]
        for name in names:
            name = name.removesuffix(".__init__")
            if not any(part.startswith("_") for part in name.split(".")) and name != f"llavakit.{part}":
                text.append(f"::: {name}\n    options: {{show_submodules: false}}")
        pages[f"reference/{part}.md"] = "\n\n".join(text)
    return pages


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository become links of the site."""
    return redirected(markdown, page.file.src_uri) if page.file.src_uri in ORIGINS else markdown
