"""Dynamic-LLaVA: learned sparsification of image tokens at prefill and of generated tokens at decoding."""

from pathlib import Path

from llavakit.system import Claim, System

_HERE = Path(__file__).parent
_PACKAGE = "llavakit.systems.dynamic_llava"

SYSTEM = System(
    slug="dynamic-llava",
    title="Dynamic-LLaVA",
    paper="2412.00876",
    summary="LLaVA-1.5 with a quarter of the prefill work and about half the memory of generated text.",
    claims=(
        Claim(
            "Learned dropping of 80 % of the image tokens before decoder layer 2 saves about 75 % of the prefill "
            "computation with hardly any loss of quality; dropping at random does not.",
            "section 4.2, table 1",
        ),
        Claim(
            "Dropping half of the generated tokens halves decoding computation without a cache, or the memory of "
            "generated text with one.",
            "section 4.3, table 3",
        ),
    ),
    checkpoints=("Osilly/Dynamic-LLaVA-7B", "Osilly/Dynamic-LLaVA-13B"),
    parts={
        "adapters": {"dynamic_sparsification": f"{_PACKAGE}.adapter:DynamicSparsification"},
        "layouts": {"dynamic-llava-classic": f"{_PACKAGE}.checkpoint:Classic"},
    },
    parity=f"{_PACKAGE}.parity:ADAPTERS",
    cost=f"{_PACKAGE}.cost:cost",
    miniature=f"{_PACKAGE}.miniature:run",
    checkpoint=f"{_PACKAGE}.checkpoint:Classic",
    recipe=_HERE / "recipe.yaml",
    readme=_HERE / "README.md",
)
