"""Whether the golden cases prove the product: entries broken on purpose, and cases run again under variations.

    python tests/parity_bites.py            every system
    python tests/parity_bites.py llava-1.5  one system

Each user entry is broken in turn; at least one case of the system must fail then, see `parity_entries`. After that
every case runs in every variation that means something for it, see `parity_variations`. Prints one line per check, and
per system how often a variation did not apply and why; exit status 1 if a check does not hold.
"""

from __future__ import annotations

import sys
from collections import Counter

from parity_entries import bites, proved_systems
from parity_variations import variations


def main(systems: list[str]) -> int:
    """Check the systems; the exit status."""
    failed = total = 0

    def note(system: str, name: str, wrong: str) -> None:
        nonlocal failed, total
        total += 1
        failed += bool(wrong)
        print(f"{'FAILED' if wrong else 'ok':7} {system:16} {name}{': ' if wrong else ''}{wrong}", flush=True)

    for system in systems or proved_systems():
        for name, holds, remark in bites(system):
            note(system, name, "" if holds else remark)
        reasons: Counter[str] = Counter()
        for name, wrong, reason in variations(system):
            if wrong is None:
                reasons[reason] += 1
            else:
                note(system, name, wrong)
        for reason, count in reasons.most_common():
            print(f"{'-':7} {system:16} {count} variations do not apply: {reason}")
    print(f"{total - failed} of {total} checks hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
