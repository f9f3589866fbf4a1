"""INF-LLaVA: one picture cut in two ways, into blocks and interleaved pieces, in the tokens of a single view."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="inf-llava",
    title="INF-LLaVA",
    paper="2407.16198",
    summary="Small details of large pictures at LLaVA-1.5's prompt length: 576 tokens for 1008 x 1008 pixels.",
    claims=(
        Claim(
            "Local blocks and interleaved global samples that enhance each other are better than either alone at the "
            "same number of tokens.",
            "section 4, ablation",
        ),
    ),
    checkpoints=("WeihuangLin/INF-LLaVA-sft", "WeihuangLin/INF_star-LLaVA-sft"),
    parts={
        "planners": {"dual_perspective": ".views:DualPerspective"},
        "connectors": {"dual_perspective": ".connector:DualPerspectiveMLP"},
        "templates": {"inf_llama_3": ".templates:INF_LLAMA_3"},
        "layouts": {"inf-llava": ".checkpoint:Published"},
    },
)
