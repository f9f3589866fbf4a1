"""What the pages show must hold: commands, names, imports, links, and the table of systems."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator

import typer
from blocks import PAGES, ROOT, blocks

from llavakit import registry
from llavakit.cli.app import app
from llavakit.cli.common import assignments
from llavakit.evaluation.score import benchmark, checked
from llavakit.system import systems

COMMANDS = typer.main.get_command(app).commands
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"^()((?: {4}.*\n)+)", re.M)


def placeholder(word: str) -> bool:
    """Whether a word stands for something that the reader puts in: it is written in capitals, as MODEL or NAME."""
    return re.fullmatch(r"[A-Z][A-Z_]*", word) is not None


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """The arguments of every `llavakit` command of a page, and whether they must be complete.

    Complete are lines in blocks of code, those that end in a backslash joined with the next. In running text code that
    begins with `llavakit ` may leave arguments out.
    """
    for block in (*FENCED.finditer(text), *INDENTED.finditer(FENCED.sub("", text))):
        for match in re.finditer(r"^ *(?:\$ )?(?:\w+=\S+ +)*(?:\S*/)?llavakit ([a-z].*)", join(block[2]), re.M):
            yield match[1].removesuffix("&"), True
    for match in re.finditer(r"`llavakit ([a-z][^`]*)`", FENCED.sub("", text)):
        yield " ".join(match[1].split()), False


def in_comments() -> Iterator[tuple[str, str, bool]]:
    """The same of the examples in `llavakit COMMAND --help` and at the heads of recipes, with where they stand."""
    for name, command in COMMANDS.items():
        for line in re.findall(r"^\s*llavakit ([a-z].*)", command.help or "", re.M):
            yield f"llavakit {name} --help", line, True
    for recipe in (*(ROOT / "src").rglob("*.yaml"), *(ROOT / "recipes").glob("*.yaml")):
        text = recipe.read_text(encoding="utf-8").replace("\\\n#", " ")
        for line in re.findall(r"^# +llavakit ([a-z].*)", text, re.M):
            yield str(recipe.relative_to(ROOT)), line, True


def join(block: str) -> str:
    """A block with its continued lines in one."""
    return re.sub(r"\\\n", " ", block)


# What an argument must be a registered name of, by command (None: by any) and argument.
REGISTERED = {
    ("eval", "task"): registry.BENCHMARKS,
    ("score", "task"): registry.BENCHMARKS,
    ("prepare", "name"): registry.PREPARATIONS,
    ("synthesize", "pipeline"): registry.PIPELINES,
    ("phantom", "world"): registry.WORLDS,
    (None, "template"): registry.TEMPLATES,
}


def parsed(line: str, complete: bool) -> tuple[str, dict] | None:
    """The command and its arguments; None where a command is named alone in running text."""
    words = shlex.split(line.replace("[KEY=VALUE]...", ""), comments=True)
    name, *words = words[: words.index(">")] if ">" in words else words
    assert name in COMMANDS, "there is no such command"
    if not words and not complete:
        return None
    command = COMMANDS[name]
    if name == "score":
        command = command.commands["report" if words[0] == "report" else "TASK"]
        words = words[1:] if words[0] == "report" else words
    context = command.make_context(name, words, resilient_parsing=not complete)
    assert not context.args, f"too much: {context.args}"
    return name, context.params


def check_names(command: str, words: dict) -> None:
    """Registered names, slugs of systems, and options by name, as far as the arguments hold them."""
    for (where, key), known in REGISTERED.items():
        name = words.get(key)
        if where in (command, None) and isinstance(name, str) and not placeholder(name):
            assert name in known, f"there is no {known.kind} {name}"
    for key in ("slug", "responder"):
        slug = words.get(key)
        assert slug is None or placeholder(slug) or slug in systems(), f"there is no system {slug}"
    if words.get("responder"):
        assert placeholder(words["responder"]) or systems()[words["responder"]].responder, (
            "that system has no responder"
        )
    if command == "prepare" and (options := assignments(words["key_values"] or ())):
        checked(registry.PREPARATIONS.get(words["name"]), options, words["name"])
    task = words.get("task")
    if options := assignments(words.get("option") or ()) if task else {}:
        checked(benchmark(task).score, options, task)
    if options := assignments(words.get("question_option") or ()) if task else {}:
        checked(benchmark(task).questions, options, task)


def test_commands_are_taken_by_the_command_line() -> None:
    shown = [(page, *found) for page, text in PAGES.items() for found in commands(text)]
    shown += in_comments()
    assert len(shown) > 350
    wrong = []
    for page, line, complete in shown:
        try:
            if (found := parsed(line, complete)) is not None:
                check_names(*found)
        except Exception as error:  # every wrong line is named, not the first alone
            wrong.append(f"{page}: llavakit {line}: {getattr(error, 'message', error)}")
    assert not wrong, "\n".join(wrong)


def test_blocks_with_commands_say_so() -> None:
    """What is `bash`, `console` or `python` runs in `make test-docs`; a command in another block would never run."""
    for page in PAGES:
        for block in blocks(page):
            if block.language not in ("bash", "console"):
                found = re.search(r"^(\$ )?llavakit [a-z].*", block.text, re.M)
                assert not found, f"{page}:{block.line}: {found[0]}: the block is not marked as bash or console"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings() -> None:
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
            there = (ROOT / page).parent / target if target else ROOT / page
            assert there.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{page}: {target}#{anchor}"


def test_snippets_of_python_are_valid_and_import_what_is_there() -> None:
    snippets = [
        (page, code) for page, text in PAGES.items() for language, code in FENCED.findall(text) if language == "python"
    ]
    assert len(snippets) > 10
    for page, code in snippets:
        for node in ast.walk(ast.parse(code, page)):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("llavakit"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    there = hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
                    assert there, f"{page}: from {node.module} import {name.name}"
            elif isinstance(node, ast.Import):
                for name in node.names:
                    assert importlib.util.find_spec(name.name), f"{page}: import {name.name}"


def test_the_table_of_systems_is_true() -> None:
    row = re.compile(r"^\| \[.*?\]\(src/llavakit/systems/(\w+)\).*?\| (\d+) of (\d+)(.*?) \| .*? \| (.*)\|$", re.M)
    rows = {found[1]: found for found in row.finditer(PAGES["README.md"])}
    cards = {
        card.package.rpartition(".")[2]: card for card in systems().values() if card.package.startswith("llavakit.")
    }
    assert rows.keys() == cards.keys()
    for folder, card in cards.items():
        _, passed, of, remark, rest = rows[folder].groups()
        cases = len(list((ROOT / "tests/golden" / card.slug).iterdir()))
        declined = sum(int(number.replace("one", "1")) for number in re.findall(r"(\w+) declined", remark))
        assert int(of) == cases, f"{card.slug}: {cases} golden cases"
        assert int(passed) + declined == int(of), card.slug
        recipe, miniature, cost = (cell.strip() for cell in rest.split("|"))
        for cell, there in ((recipe, card.recipe), (miniature, card.miniature), (cost, card.cost)):
            # "yes" promises it and an empty cell denies it; other words say what else is the case
            assert cell not in ("yes", "") or (cell == "yes") == (there is not None), f"{card.slug}: {cell!r}"
