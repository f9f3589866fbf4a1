"""Reports of MIMIC-CXR to the sentences that MIMIC-NLE names: sections by their headers, then numbered sentences.

The rules are those of MIMIC-CXR's section splitter and of MIMIC-NLE's preprocessing. A data set ships ids alone
(`REPORT#k`), so every deviation would attach an explanation to another sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llavakit.retrieval.sentences import sentences

_HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
_PARAGRAPH = "\n \n"
TAKEN = ("findings", "impression")
_SAME = "preamble impression comparison indication findings examination technique history notification addendum date "
NAMES = {name: name for name in f"{_SAME}comment recommendations".split()} | {
    "wet read": "wet read",
    "wetread": "wet read",
    "comparisons": "comparison",
    "reference exam": "comparison",
    "comparison exam": "comparison",
    "comparison film": "comparison",
    "reason for examination": "indication",
    "reason for exam": "indication",
    "clinical indication": "indication",
    "clinical history": "history",
    "clinical information": "history",
    "patient history": "history",
    "pfi": "history",
    "exam": "examination",
    "type of examination": "examination",
    "conclusion": "impression",
    "findings and impression": "impression",
    "findings/impression": "impression",
    "findings/ impression": "impression",
    "chest, two views": "findings",
    "reference findings": "findings",
    "recommendation(s)": "recommendations",
    "recommendation": "recommendations",
}
_MISSPELT = {
    "impression": "ndication impresson imprression imoression impressoin imprssion impresion imperssion mpression "
    "impession",
    "findings": "finding findins findindgs findgings findngs findnings finidngs",
    "indication": "idication",
    "comparison": "comparision comparsion comparrison comparisions",
}
NAMES |= {wrong: name for name, spellings in _MISSPELT.items() for wrong in spellings.split()}
MAIN = ("impression", "findings", "history", "comparison", "addendum")
FINDINGS_WORDS = (
    "chest",
    "portable",
    "pa and lateral",
    "lateral and pa",
    "ap and lateral",
    "lateral and ap",
    "frontal and",
    "two views",
    "frontal view",
    "pa view",
    "ap view",
    "one view",
    "lateral view",
    "bone window",
    "frontal upright",
    "frontal semi-upright",
    "ribs",
    "pa and lat",
)


@dataclass(frozen=True)
class Headers:
    """How sections are called.

    Attributes:
        names: What a header means, as it is written in lower case.
        main: A name that holds one of these is it.
        findings: A name that holds one of these describes findings.
    """

    names: Mapping[str, str] = field(default_factory=lambda: NAMES)
    main: Sequence[str] = MAIN
    findings: Sequence[str] = FINDINGS_WORDS

    def meaning(self, header: str) -> str:
        """The name of a section by its header."""
        name = header.lower().strip()
        if name in self.names:
            return self.names[name]
        contained = next((main for main in self.main if main in name), None)
        if contained is not None:
            return contained
        return "findings" if any(word in name for word in self.findings) else name


@dataclass(frozen=True)
class Section:
    """A section of a report: its name, text, and where the text begins."""

    name: str
    text: str
    start: int


def sections(report: str, headers: Headers | None = None) -> list[Section]:
    """The sections of a report, in order."""
    headers = headers or Headers()
    header = _HEADER.search(report)
    if header is None:
        found = [Section(headers.meaning("full report"), report, 0)]
    else:
        found = [Section(headers.meaning("preamble"), report[: header.start(1)], 0)]
    while header is not None:
        begin = header.end()
        # the next header is not looked for in the line of this one
        following = _HEADER.search(report, begin + max(report[begin:].find("\n"), 0))
        text = report[begin : len(report) if following is None else following.start()]
        found.append(Section(headers.meaning(header[1]), text, begin))
        header = following
    found = [section for section in found if section.name not in TAKEN or section.text.strip()]
    if found and not any(section.name in TAKEN for section in found) and _PARAGRAPH in found[-1].text:
        last = found[-1]
        kept, _, rest = last.text.partition(_PARAGRAPH)
        found[-1:] = [Section(last.name, kept, last.start), Section("last_paragraph", rest, last.start + len(kept))]
    return found


def explanations(report: str, headers: Headers | None = None) -> list[str]:
    """The numbered sentences of a report's findings and impression."""
    taken = [section.text.replace("\n", "") for section in sections(report, headers) if section.name in TAKEN]
    text = "".join(taken).replace("  ", " ")
    return [sentence.lstrip(" ") for sentence, _ in sentences(text)]
