"""What a model sees of a sample, in the terminal: sizes, media, and the prompt with its special tokens.

Learned tokens are green and between ⟦ ⟧, special tokens and separators magenta, visual tokens counted in cyan.
"""

from __future__ import annotations

import itertools
from typing import Any

from rich.table import Table
from rich.text import Text

from llavakit.inspection.sample import SEPARATOR, SPECIAL, TEXT, VISUAL, Seen, SeenMedia

VIEWS = 12  # that are listed


def renderables(seen: Seen, *, tokens: bool = False) -> list[Any]:
    """What is printed.

    Args:
        tokens: List every position with its id, instead of the running text.
    """
    found: list[Any] = [_head(seen)]
    for number, item in enumerate(seen.media, 1):
        found += [Text(title(number, item), "bold"), _media(item)]
    found.append(_listed(seen) if tokens else prompt(seen))
    return found


def summary(seen: Seen) -> str:
    """How many positions there are of each kind."""
    kinds = ((VISUAL, "visual"), (SEPARATOR, "separators among them"), (SPECIAL, "special"), (TEXT, "text"))
    counts = [f"{seen.count(kind):,} {name}" for kind, name in kinds if seen.count(kind)]
    learned = [f"{seen.learned:,} learned"] if seen.training else []
    return f"{len(seen.tokens):,} positions: {', '.join(counts + learned)}"


def _head(seen: Seen) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("template", f"{seen.template}, {'a training sample' if seen.training else 'a prompt to answer'}")
    table.add_row("tokens", summary(seen))
    table.add_row("ends with", ", ".join(seen.stops) or "-")
    for note in seen.notes:
        table.add_row("note", note)
    return table


def size(grid: Any) -> str:
    """Depth, rows and columns, as "24 x 24"; a depth of 1 is left out."""
    sides = [side for number, side in enumerate(grid) if number or side != 1]
    return " x ".join(map(str, sides))


def title(number: int, item: SeenMedia) -> str:
    """A media item in one line."""
    tiles = f", {item.tiles[0]} x {item.tiles[1]} tiles" if any(item.tiles) else ""
    separators = f" and {item.separators:,} separators" if item.separators else ""
    return (
        f"{item.modality} {number}: {item.name}, {size(item.size)}, {item.planner}{tiles}, {len(item.views)} "
        f"view{'' if len(item.views) == 1 else 's'} -> {item.visual:,} visual tokens{separators}"
    )


def _media(item: SeenMedia) -> Table:
    table = Table("view", "place", "pixels", "encoder", "features")
    for view in item.views[:VIEWS]:
        pixels = size((view.depth, view.height, view.width))
        table.add_row(view.role, f"{view.row}, {view.col}", pixels, view.encoder, size(view.grid))
    if len(item.views) > VIEWS:
        table.add_row(f"and {len(item.views) - VIEWS} more")
    grids = ", ".join(f"{len(list(same))} of {size(grid)}" for grid, same in itertools.groupby(item.grids))
    table.caption = f"after the connector: {grids}"
    return table


def prompt(seen: Seen) -> Text:
    """The running text."""
    text = Text()
    for (learned, kind, number), run in itertools.groupby(seen.tokens, lambda t: (t.learned, t.kind, t.media)):
        tokens = list(run)
        if kind == VISUAL:
            text.append(f"[{len(tokens)} visual tokens of {seen.media[number].modality} {number + 1}]", "cyan")
            continue
        said = "".join(token.text for token in tokens)
        style = "bold green" if learned else "magenta" if kind in (SPECIAL, SEPARATOR) else ""
        text.append(f"⟦{said}⟧" if learned else said, style)
    return text


def _listed(seen: Seen) -> Table:
    table = Table("position", "id", "token", "kind", "learned")
    begin = 0
    for _, run in itertools.groupby(seen.tokens, lambda t: (VISUAL, t.media) if t.kind == VISUAL else id(t)):
        tokens = list(run)
        token, count = tokens[0], len(tokens)
        place = str(begin) if count == 1 else f"{begin} to {begin + count - 1}"
        name = f"{count} of media item {token.media + 1}" if token.kind == VISUAL else repr(token.text)
        weight = "" if token.weight in (None, 1.0) else f", weight {token.weight:g}"
        table.add_row(place, str(token.id), name, token.kind, f"yes{weight}" if token.learned else "")
        begin += count
    return table
