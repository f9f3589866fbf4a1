"""LLaVA-OneVision: one model for single images, several images and video (SigLIP, Qwen2, tiles under a budget)."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-onevision",
    title="LLaVA-OneVision",
    paper="2408.03326",
    summary="Ask about one picture in full detail, about several pictures, or about a video, with the same weights.",
    claims=(
        Claim(
            "Skills learned on single images transfer to several images and to video without a change of architecture.",
            "section 4.4, table 9",
        ),
        Claim(
            "Shrinking the map of tiles to a budget of tokens keeps the detail that high resolution brings.",
            "section 3.2, figure 3",
        ),
    ),
    checkpoints=tuple(
        [f"lmms-lab/llava-onevision-qwen2-{size}-{kind}" for size in ("0.5b", "7b", "72b") for kind in ("si", "ov")]
        + [f"lmms-lab/llava-onevision-qwen2-{size}-ov-chat" for size in ("7b", "72b")]
        + [
            f"llava-hf/llava-onevision-qwen2-{size}-{kind}-hf"
            for size in ("0.5b", "7b", "72b")
            for kind in ("si", "ov")
        ]
    ),
    parts={
        "connectors": {"residual_mlp": ".residual:ResidualMLP"},
        "layouts": {
            "llava-onevision-classic": ".checkpoint:OnevisionLayout",
            "llava-onevision-hf": ".hf_checkpoint:OnevisionTransformersLayout",
        },
    },
)
