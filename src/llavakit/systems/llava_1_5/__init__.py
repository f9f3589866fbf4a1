"""LLaVA-1.5: the base system (CLIP encoder, MLP connector, Vicuna, two training stages)."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-1.5",
    title="LLaVA-1.5",
    paper="2310.03744",
    summary="Talk about a picture, briefly or at length: the reference recipe that the other systems modify.",
    claims=(
        Claim(
            "A response-format sentence lets one model answer in one word or in sentences on demand.",
            "section 3.2, table 2",
        ),
        Claim("An MLP connector is better than a linear one.", "section 3.3, table 2"),
    ),
    checkpoints=(
        "liuhaotian/llava-v1.5-7b",
        "liuhaotian/llava-v1.5-13b",
        "liuhaotian/llava-v1.5-7b-lora",
        "liuhaotian/llava-v1.5-13b-lora",
        "llava-hf/llava-1.5-7b-hf",
        "llava-hf/llava-1.5-13b-hf",
    ),
    parts={
        "layouts": {
            "llava-1.5-classic": ".checkpoint:LlavaLayout",
            "llava-1.5-hf": ".checkpoint:LlavaTransformersLayout",
        },
        "templates": {
            "mpt_miscounted": ".templates:MPT",
            "chatml_direct_miscounted": ".templates:CHATML_DIRECT",
        },
    },
)
