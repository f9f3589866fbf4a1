"""LLaVA-1.5: the base system (CLIP encoder, MLP connector, Vicuna, two training stages)."""

from pathlib import Path

from llavakit.system import Claim, System

_HERE = Path(__file__).parent
_PACKAGE = "llavakit.systems.llava_1_5"

SYSTEM = System(
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
        "layouts": {"llava-1.5-classic": f"{_PACKAGE}.checkpoint:Classic", "llava-1.5-hf": f"{_PACKAGE}.checkpoint:Hf"},
        "templates": {
            "mpt_miscounted": f"{_PACKAGE}.templates:MPT",
            "chatml_direct_miscounted": f"{_PACKAGE}.templates:CHATML_DIRECT",
        },
    },
    parity=f"{_PACKAGE}.parity:ADAPTERS",
    cost=f"{_PACKAGE}.cost:cost",
    miniature=f"{_PACKAGE}.miniature:run",
    checkpoint=f"{_PACKAGE}.checkpoint:Classic",
    recipe=_HERE / "recipe.yaml",
    readme=_HERE / "README.md",
)
