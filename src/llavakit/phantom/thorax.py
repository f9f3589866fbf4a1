"""The thorax world: patients with radiograph, CT volume, report, questions, knowledge and a follow-up study.

A patient is a set of numbers (`anatomy.Chest`) plus a list of findings. Pictures and sentences are made from the same
numbers, so the text is true of the pixels, except for what physics hides: one projection does not show depth, and a
nodule of a few millimetres is lost in the noise of a small matrix.

Answers are balanced by construction: without the picture no question can be answered better than by guessing among
its possible answers. Sides are the patient's; the patient's right is at the left edge of the picture.

This module knows the names of findings and the questions about them; geometry and physics are in `anatomy`.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from llavakit.phantom import anatomy, words
from llavakit.phantom.anatomy import Chest
from llavakit.phantom.base import (
    Box,
    Case,
    Item,
    World,
    check_choice,
    check_range,
    generator,
    pick,
    select_types,
    split_of,
)
from llavakit.phantom.patient import (
    CHANGES,
    DEPTHS,
    MODALITIES,
    SETTINGS,
    SIZES,
    ZONES,
    Finding,
    build_chest,
    draw_findings,
    find_boxes,
    find_masks,
    progress,
)
from llavakit.phantom.report import (
    EASY_TYPES,
    IMAGE_TYPES,
    KNOWLEDGE,
    VOLUME_TYPES,
    ask,
    change_question,
    count_question,
    describe,
    detail_question,
    presence_question,
    statements,
    write_report,
)

_EASY_KINDS = ("cardiomegaly", "consolidation", "effusion", "pneumothorax")
_DESCRIBE = "Describe the findings in this radiograph."
_DESCRIBE_SCAN = "Describe the findings in this scan."
_COMPARE = "Compare the second radiograph with the first."


class Thorax(World):
    """Chest radiographs and CT volumes with reports and questions.

    Args:
        size: Pixels along each side of the radiograph.
        difficulty: "full", or "easy": larger findings, all in one lung, no nodules, no counting; learnable by a tiny
            model at 32 to 64 pixels.
        types: Question types about the radiograph, of `IMAGE_TYPES`; None for those of the difficulty.
        findings: Kinds of findings that occur, of `KINDS`; None for those of the difficulty.
        volumes: Add an item with the CT volume and a question that only depth answers.
        grid: Voxels along each axis of the volume.
        followups: Add an item with a second study in which findings have grown, shrunk or gone.
        masks: Add the outline of every finding to the radiograph.
        noise: Photon and detector noise.
    """

    name = "thorax"
    version = 2

    def __init__(
        self,
        *,
        size: int = 64,
        difficulty: str = "full",
        types: Any = None,
        findings: Any = None,
        volumes: bool = False,
        grid: int = 48,
        followups: bool = False,
        masks: bool = False,
        noise: bool = True,
    ) -> None:
        self.size = int(check_range("size", size, 16, 2048))
        self.difficulty = check_choice("difficulty", difficulty, tuple(SETTINGS))
        self.setting = SETTINGS[difficulty]
        easy = difficulty == "easy"
        self.types = select_types(types, IMAGE_TYPES, EASY_TYPES if easy else IMAGE_TYPES)
        kinds = select_types(findings, MODALITIES, _EASY_KINDS if easy else MODALITIES)
        self.kinds = tuple(kind for kind in MODALITIES if kind in kinds)
        self.volumes = volumes
        self.grid = int(check_range("grid", grid, 8, 512))
        self.followups = followups
        self.masks = masks
        self.noise = noise

    def sample(self, seed: int, index: int) -> Case:
        """Patient number `index`; see `World.sample`."""
        rng = generator(seed, index, "thorax/patient")
        most = 3 if "count" in self.types else 1
        findings = draw_findings(rng, self.kinds, most, self.setting)
        chest = build_chest(rng, findings, self.setting)
        case_id = f"thorax-{seed}-{index:07d}"
        image = self._radiograph(chest, generator(seed, index, "thorax/noise") if self.noise else None)
        asking = generator(seed, index, "thorax/questions")
        report = write_report(findings, self.kinds)
        items = [
            Item(
                id=case_id,
                kind="image",
                media=(image,),
                questions=ask(asking, findings, self.types, self.kinds, self.setting),
                caption=report["findings"],
                caption_prompt=_DESCRIBE,
                boxes=[Box(f.kind, _box_name(f, findings), xyxy) for f, xyxy in find_boxes(chest, findings)],
                masks=find_masks(chest, findings, (self.size, self.size)) if self.masks else {},
            )
        ]
        if self.volumes:
            items.append(self._volume_item(case_id, chest, findings, generator(seed, index, "thorax/volume"), report))
        if self.followups:
            items.append(self._followup_item(case_id, chest, findings, image, seed, index))
        return Case(
            id=case_id,
            split=split_of(index),
            items=items,
            facts={
                "findings": [finding.facts() for finding in findings],
                "labels": {kind: any(f.kind == kind for f in findings) for kind in self.kinds},
            },
            report=report,
            triples=statements(findings),
        )

    def _radiograph(self, chest: Chest, noise: np.random.Generator | None) -> np.ndarray:
        return anatomy.expose(anatomy.line_integrals(chest, (self.size, self.size)), noise)

    def _volume_item(
        self, case_id: str, chest: Chest, findings: list[Finding], rng: np.random.Generator, report: dict[str, str]
    ) -> Item:
        hounsfield, spacing = anatomy.volume(chest, (self.grid, self.grid, self.grid))
        questions = ask(rng, findings, VOLUME_TYPES, self.kinds, self.setting, picture="scan")
        return Item(
            id=f"{case_id}-ct",
            kind="volume",
            media=(hounsfield,),
            questions=questions,
            caption=report["findings"],
            caption_prompt=_DESCRIBE_SCAN,
            spacing=spacing,
        )

    def _followup_item(
        self, case_id: str, chest: Chest, findings: list[Finding], first: np.ndarray, seed: int, index: int
    ) -> Item:
        rng = generator(seed, index, "thorax/followup")
        changes = {i: pick(rng, CHANGES) for i, f in enumerate(findings) if f.kind != "cardiomegaly"}
        later = progress(chest, findings, changes)
        second = self._radiograph(later, rng if self.noise else None)
        questions = [change_question(describe(findings[i], findings), change) for i, change in changes.items()]
        return Item(
            id=f"{case_id}-followup",
            kind="images",
            media=(first, second),
            questions=questions,
            caption=" ".join(q.sentence for q in questions) or "There is no change.",
            caption_prompt=_COMPARE,
        )

    def texts(self) -> list[str]:
        """Every sentence form with every word in it; see `World.texts`."""
        questions = [count_question(n) for n in (1, 2, 3)]
        captions = ["There is no change."]
        for kind in MODALITIES:
            questions += [presence_question(kind, p, s) for p in (True, False) for s in ("radiograph", "scan")]
            for type_, values in (("side", anatomy.SIDES), ("zone", ZONES), ("size", SIZES), ("depth", DEPTHS)):
                questions += [detail_question(type_, kind, value) for value in values]
            for side in anatomy.SIDES:
                for zone, size in itertools.product(ZONES, SIZES):
                    finding = Finding(kind) if kind == "cardiomegaly" else Finding(kind, side, zone, size)
                    several = [finding] * (3 if kind == "nodule" else 1)
                    for found in ([], [finding], several, several[:2]):
                        report = write_report(found, MODALITIES)
                        captions.append(f"Findings: {report['findings']} Impression: {report['impression']}")
                    questions += [change_question(describe(finding, several), change) for change in CHANGES]
                    captions += [" ".join(statement) for statement in statements([finding])]
        out = words.shared_texts() + captions + [f"{q.text} {q.answer} {q.sentence}" for q in questions]
        return out + [_DESCRIBE, _DESCRIBE_SCAN, _COMPARE] + [" ".join(statement) for statement in KNOWLEDGE]

    def knowledge(self) -> list[tuple[str, str, str]]:
        """What the findings of this world suggest."""
        return list(KNOWLEDGE)


def _box_name(finding: Finding, findings: list[Finding]) -> str:
    return "heart" if finding.kind == "cardiomegaly" else describe(finding, findings)
