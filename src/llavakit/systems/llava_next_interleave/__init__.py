"""LLaVA-NeXT-Interleave: pictures, frames and views anywhere in a text, as one format."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-next-interleave",
    title="LLaVA-NeXT-Interleave",
    paper="2407.07895",
    summary="Pictures, frames of a video or views of a scene anywhere in a text, with one set of weights.",
    claims=(
        Claim(
            "Training on both placements, pictures where the text mentions them and all pictures in front, improves "
            "the answers under both.",
            "section 4.4, ablation",
        ),
    ),
    checkpoints=tuple(
        [f"lmms-lab/llava-next-interleave-qwen-{size}" for size in ("0.5b", "7b", "7b-dpo")]
        + [f"llava-hf/llava-interleave-qwen-{size}-hf" for size in ("0.5b", "7b", "7b-dpo")]
    ),
    parts={
        "templates": {
            "qwen_1_5_interleaved": ".templates:INTERLEAVED",
            "qwen_1_5_pieces": ".templates:PUBLISHED_EVALUATION",
            "qwen_1_5_pieces_restarting": ".templates:PUBLISHED_TURNS",
        },
        "benchmarks": {"interleave_bench": ".benchmark:InterleaveBench"},
        "layouts": {
            "llava-next-interleave": ".checkpoint:InterleaveLayout",
            "llava-next-interleave-hf": ".checkpoint:InterleaveTransformersLayout",
        },
    },
)
