"""What a model sees of a sample, as a page: views as pictures, the prompt with labels in colour, ids on hover."""

from __future__ import annotations

import html
import itertools
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llavakit.inspection.sample import SEPARATOR, SPECIAL, VISUAL, Seen, SeenMedia, Token
from llavakit.inspection.terminal import size, summary, title
from llavakit.pages import document, inline

PICTURES = 48  # views of a media item that are shown
_STYLE = """
.prompt { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .92rem/1.9 ui-monospace, monospace }
.prompt span:hover { outline: 1px solid var(--accent) } .special { color: #a2459c } .visual { background: var(--accent);
  color: var(--page); border-radius: .3rem; padding: .1rem .4rem }
.learned { color: var(--good); border-bottom: 2px solid var(--good) }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .6rem }
.views img { width: 100%; image-rendering: pixelated; display: block } table.small td { text-align: left }
"""


def sample_page(seen: Seen, name: str, model: str) -> str:
    """The page.

    Args:
        name, model: What is shown, for the head.
    """
    pictures = iter(seen.pictures)
    media = "".join(
        _media(number, item, [next(pictures, None) for _ in item.views]) for number, item in enumerate(seen.media, 1)
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in seen.notes)
    kind = "training sample" if seen.training else "prompt to answer"
    learned = (
        '<span class="learned">learned</span>, ' if seen.training else ""
    ) + '<span class="special">special tokens and separators</span>, <span class="visual">visual tokens</span>'
    body = f"""<h1>{html.escape(name)}</h1>
<p class="lead">as {html.escape(model)} sees it: a {kind} in the template {html.escape(seen.template)}</p>
<div class="numbers"><div class="number"><b>{len(seen.tokens):,}</b>positions</div>
<div class="number"><b>{seen.count(VISUAL):,}</b>visual tokens</div>
{f'<div class="number"><b>{seen.learned:,}</b>learned</div>' if seen.training else ""}</div>
<p class="small">{html.escape(summary(seen))}. A reply ends with {html.escape(", ".join(seen.stops) or "nothing")}.</p>
{notes}{media}<h2>Prompt</h2><p class="small">{learned}; ids are shown on hover</p>
<div class="prompt">{_prompt(seen)}</div>"""
    return document(f"{name} as {model} sees it", body, _STYLE)


def _prompt(seen: Seen) -> str:
    parts = []
    for (visual, number), run in itertools.groupby(seen.tokens, lambda t: (t.kind == VISUAL, t.media)):
        tokens = list(run)
        if visual:
            item = seen.media[number]
            parts.append(f'<span class="visual">{len(tokens):,} visual tokens of {item.modality} {number + 1}</span>')
        else:
            parts += map(_token, tokens)
    return "".join(parts)


def _token(token: Token) -> str:
    classes = [*(["learned"] if token.learned else []), *(["special"] if token.kind in (SPECIAL, SEPARATOR) else [])]
    told = f"{token.id}" + ("" if token.weight in (None, 1.0) else f", weight {token.weight:g}")
    chosen = f' class="{" ".join(classes)}"' if classes else ""
    return f'<span{chosen} title="{told}">{html.escape(token.text)}</span>'


def _media(number: int, item: SeenMedia, pictures: list[Tensor | None]) -> str:
    cards = "".join(
        f'<div><img alt="view {place + 1}" src="{inline(as_picture(picture), 256)}"><div class="small">'
        f"{html.escape(view.role)}{f' {view.row}, {view.col}' if any(item.tiles) else ''}, "
        f"{size((view.depth, view.height, view.width))}, features {size(view.grid)}</div></div>"
        for place, (view, picture) in enumerate(zip(item.views, pictures, strict=True))
        if picture is not None and place < PICTURES
    )
    more = f'<p class="small">and {len(item.views) - PICTURES} more</p>' if len(item.views) > PICTURES else ""
    grids = ", ".join(f"{len(list(same))} of {size(grid)}" for grid, same in itertools.groupby(item.grids))
    return (
        f'<h2>{html.escape(title(number, item))}</h2><div class="views">{cards}</div>{more}'
        f'<p class="small">after the connector: {grids}</p>'
    )


def as_picture(view: Any) -> Image.Image:
    """An encoder input [channels, (depth,) height, width] as a picture of its whole range; its middle slice."""
    values = torch.as_tensor(view).detach().float()
    if values.dim() == 4:
        values = values[:, values.shape[1] // 2]
    values = values[:3] if values.shape[0] >= 3 else values[:1].expand(3, -1, -1)
    low, high = values.min(), values.max()
    values = (values - low) / (high - low).clamp(min=1e-6)
    return Image.fromarray((values * 255).round().byte().permute(1, 2, 0).numpy())
