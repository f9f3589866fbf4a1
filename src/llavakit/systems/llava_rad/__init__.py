"""LLaVA-Rad: the findings section of a report from one frontal chest radiograph."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-rad",
    title="LLaVA-Rad",
    paper="2403.08002",
    summary="Findings of a frontal chest radiograph, on one card; reports scored as the paper does.",
    claims=(
        Claim(
            "An encoder trained on the domain's pairs of images and reports lets a small model write better findings "
            "than a general encoder, everything else equal.",
            "Results, ablation of the encoder",
        ),
    ),
    checkpoints=("microsoft/llava-rad",),
    parts={
        "layouts": {"llava-rad": ".checkpoint:Published"},
        "preparations": {"mimic_cxr_findings": ".records:mimic_cxr_findings"},
        "pipelines": {
            "findings_by_rules": ".sections:FindingsByRules",
            "findings_by_teacher": ".sections:FindingsByTeacher",
        },
        "rubrics": {"chexprompt": ".rubrics:CHEXPROMPT"},
    },
)
