"""LLaVA-o1 (LLaVA-CoT): replies in four stages, and searches over them at test time."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-o1",
    title="LLaVA-o1",
    paper="2411.10440",
    summary="Answers that plan, describe, reason and conclude, with the best candidate kept at every stage.",
    claims=(
        Claim("Training on answers in four stages beats training on the answers alone.", "table 3"),
        Claim("Choosing among candidates stage by stage beats choosing among whole answers.", "section 4.3"),
    ),
    checkpoints=("Xkev/Llama-3.2V-11B-cot",),
    parts={
        "templates": {"llava_o1": ".templates:LLAVA_O1"},
        "codecs": {"llava_o1": ".stages:stages_codec"},
        "label_policies": {"header_break": ".labels:HeaderBreak"},
        "preparations": {
            "staged_answers": ".records:staged_answers",
            "staged_questions": ".questions:staged_questions",
        },
    },
    codec="llava_o1",
    responder=".responder:StagedSearch",
)
