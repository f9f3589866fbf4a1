"""Med42-v2: Llama-3 tuned on clinical instructions and aligned in three stages; text alone."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="med42-v2",
    title="Med42-v2",
    paper="2408.06142",
    summary="Ask clinical questions in text, or give a LLaVA a clinical language model.",
    claims=(
        Claim(
            "Instruction tuning on medical data raises accuracy on medical questions and ends refusals.",
            "tables 4 and 5",
        ),
        Claim("Three stages of preference training, each against the stage before, align the model.", "section 2.2"),
    ),
    checkpoints=("m42-health/Llama3-Med42-8B", "m42-health/Llama3-Med42-70B"),
    parts={"templates": {"med42_v2": ".templates:MED42_V2"}},
)
