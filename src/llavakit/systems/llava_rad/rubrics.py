"""The rubric by which a judge counts errors of reports: CheXprompt (arXiv 2403.08002)."""

from pathlib import Path

CHEXPROMPT = Path(__file__).with_name("chexprompt.yaml")
