"""Pages of results: one HTML file each, with everything in it and nothing fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

WIDEST = 320
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee6; --page: #fbfcfd; --card: #fff;
  --good: #1f7a4d; --bad: #b3372f; --accent: #2f5fa8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b4; --line: #333c48; --page: #14181d;
  --card: #1c2229; --good: #5cc08c; --bad: #ec8078; --accent: #7aa7ea } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  padding: 1.5rem; max-width: 62rem }
h1 { font-size: 1.6rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 2rem 0 .75rem }
p.lead { color: var(--soft); margin: 0 0 1rem }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem }
.number { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1.2rem }
.number b { display: block; font-size: 1.8rem; color: var(--accent) }
table { border-collapse: collapse; width: 100% } th, td { text-align: right; padding: .35rem .6rem;
  border-bottom: 1px solid var(--line) } th:first-child, td:first-child { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem }
.wide { grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden }
.card img { width: 100%; image-rendering: pixelated; display: block; background: #000 }
.card div { padding: .6rem .8rem; font-size: .92rem } .right { color: var(--good) } .wrong { color: var(--bad) }
.small, dt { color: var(--soft); font-size: .85rem } .soft { color: var(--soft) }
dd { margin: 0 0 .4rem; overflow-wrap: anywhere } svg { width: 100%; height: auto }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: Plain text.
        body: HTML; whoever writes it escapes what it holds.
        style: Rules beside `STYLE`.
    """
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>
<style>{STYLE}{style}</style></head><body>
{body}
</body></html>
"""


def inline(picture: Image.Image, widest: int = WIDEST) -> str:
    """A picture as a data URL, made smaller where it is wider than `widest` pixels."""
    if picture.width > widest:
        picture = picture.resize((widest, max(picture.height * widest // picture.width, 1)))
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def curve(log: Sequence[Mapping[str, float]], width: int = 420, height: int = 170) -> str:
    """A loss curve as inline SVG."""
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if len(points) < 2:
        return '<p class="small">too few steps for a curve</p>'
    left, bottom, top = 40, 24, 10
    last, most = points[-1][0], max(loss for _, loss in points)
    x = lambda step: left + (width - left - 8) * step / last  # noqa: E731
    y = lambda loss: height - bottom - (height - bottom - top) * loss / most  # noqa: E731
    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    marks = "".join(
        f'<line x1="{left}" x2="{width - 8}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.2g}</text>'
        for v in (0, most / 2, most)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" font-size="11" fill="var(--soft)" role="img" aria-label="loss by step">'
        f'{marks}<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="2"/>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">step {last}</text></svg>'
    )
