"""CheXprompt: a judge counts the errors of a report in six types, significant or not (arXiv 2403.08002)."""

from __future__ import annotations

from dataclasses import dataclass

ERRORS = {
    "A": "false_positive_finding",
    "B": "omission_finding",
    "C": "incorrect_location",
    "D": "incorrect_severity",
    "E": "false_positive_comparison",
    "F": "omission_comparison",
}
SIGNIFICANT, INSIGNIFICANT = (
    f"Number of clinically {kind} errors by type:" for kind in ("significant", "insignificant")
)
EXPLANATION = "Explanation"


@dataclass(frozen=True)
class Rating:
    """What a judge counted.

    Attributes:
        significant, insignificant: Errors by type; None if that part cannot be read.
        valid: Whether the reply holds both headings; a reply without is asked for again.
    """

    significant: dict[str, int] | None
    insignificant: dict[str, int] | None
    valid: bool


def parse(reply: str) -> Rating:
    """The counts in a judge's reply; what cannot be read is None, never an exception."""
    if SIGNIFICANT not in reply or INSIGNIFICANT not in reply:
        return Rating(None, None, valid=False)
    counted = reply.split(EXPLANATION)[0]
    _, _, after = counted.partition(SIGNIFICANT)
    first, _, second = after.partition(f"\n{INSIGNIFICANT}")
    return Rating(_counts(first), _counts(second), valid=True)


def _counts(text: str) -> dict[str, int] | None:
    """Counts of `[(A, 1), (B, 0)]`; the published reader names the first type wrongly where no space is in front."""
    if not text.startswith(" "):
        return None
    counts: dict[str, int] = {}
    for pair in text.split("),"):
        key, comma, number = pair.translate(str.maketrans("", "", "()[]")).partition(",")
        try:
            counts[ERRORS.get(key.strip(), key.strip())] = int(number)
        except ValueError:
            return None
        if not comma:
            return None
    return counts


def tail(examples: str, reference: str, candidate: str) -> str:
    """The end of the message to the judge, behind the instructions."""
    reports = f'Reference Findings: """{reference}"""\n\nCandidate Findings: """{candidate}"""'
    return f"##\n{examples}\n##\n{reports}\n\nErrors:"
