"""docs/security.md names the test of each promise: they must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = [line.split("|")[1:4] for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("| ")]


def test_every_promise_has_a_test_that_exists():
    promises = [row for row in ROWS if row[0].strip() not in ("promise", "---") and "---" not in row[0]]
    assert len(promises) > 15
    for promise, module, tests in promises:
        (path,) = re.findall(r"`([\w/]+\.py)`", module)
        assert (ROOT / "src/llavakit" / path).is_file(), path
        named = re.findall(r"`(?:(?:tests/)?([\w/]+\.py))?(?:::)?(test_\w+)?`", tests)
        assert named, promise
        text = ""
        for file, name in named:
            text = (ROOT / "tests" / file).read_text() if file else text
            assert not name or f"def {name}(" in text, name
