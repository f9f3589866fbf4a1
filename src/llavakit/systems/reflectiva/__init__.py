"""ReflectiVA: a model that says whether it must look something up, and which of the passages found help."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="reflectiva",
    title="ReflectiVA",
    paper="2411.16863",
    summary="Encyclopedic questions about pictures: look up pages, judge every passage, answer from those that help.",
    claims=(
        Claim(
            "Judging every retrieved passage by itself and answering from those kept beats answering from all of them.",
            "section 4, tables 1 and 2",
        ),
        Claim("Saying first whether a passage is needed keeps answers to ordinary visual questions.", "section 4"),
    ),
    checkpoints=("aimagelab/ReflectiVA",),
    parts={
        "templates": {"reflectiva": ".templates:REFLECTIVA"},
        "label_policies": {"reflective": ".labels:ReflectiveLabels"},
        "objectives": {"reflective": ".objective:Reflective"},
        "benchmarks": {
            "encyclopedic-vqa": ".benchmarks:EncyclopedicVQA",
            "infoseek": ".benchmarks:InfoSeek",
        },
        "preparations": {
            "reflective_list": ".dialogues:reflective_list",
            "reflective_pairs": ".labelling:reflective_pairs",
            "reflective_labels": ".labelling:reflective_labels",
        },
        "layouts": {"reflectiva": ".checkpoint:ReflectivaLayout"},
    },
    responder=".responder:Reflection",
)
