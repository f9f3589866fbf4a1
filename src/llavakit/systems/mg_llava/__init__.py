"""MG-LLaVA: a high-resolution encoder fused into the tokens of a low one, and one token per detected object."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="mg-llava",
    title="MG-LLaVA",
    paper="2406.17770",
    summary="Objects, counts and fine detail: 768 pixels in 576 tokens, plus one token per box of a detector.",
    claims=(
        Claim(
            "One token per detected object, read from high-resolution features, helps a model see small things.",
            "section 4, ablation",
        ),
    ),
    checkpoints=("PhoenixZ/MG-LLaVA",),
    parts={
        "encoders": {"convnext_pyramid": ".encoder:ConvNextPyramid"},
        "planners": {"low_and_high": ".views:LowAndHigh", "with_objects": ".with_objects:WithObjects"},
        "connectors": {"conv_gate": ".connector:ConvGateMLP", "with_objects": ".with_objects:ConnectorWithObjects"},
        "arrangements": {"then_objects": ".with_objects:ThenObjects"},
        "templates": {
            "mg_vicuna": ".templates:MG_VICUNA",
            "mg_llama_3": ".templates:MG_LLAMA_3",
            "mg_phi_3": ".templates:MG_PHI_3",
            "mg_qwen": ".templates:MG_QWEN",
        },
        "benchmarks": {
            "mg_multiple_choice": ".benchmarks:MultipleChoice",
            "mg_pope": ".benchmarks:YesNoPOPE",
            "mg_mme": ".benchmarks:YesNoMME",
            "mg_chartqa": ".benchmarks:ChartQA",
            "mg_ocrvqa": ".benchmarks:OCRVQA",
            "mg_tallyqa": ".benchmarks:TallyQA",
            "mg_hallusion": ".benchmarks:HallusionBench",
            "mg_docvqa": ".benchmarks:DocVQA",
        },
        "layouts": {"mg-llava": ".checkpoint:MgLayout"},
    },
)
