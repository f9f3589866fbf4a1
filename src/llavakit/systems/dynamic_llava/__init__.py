"""Dynamic-LLaVA: learned sparsification of image tokens at prefill and of generated tokens at decoding."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
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
        "adapters": {"dynamic_sparsification": ".adapter:DynamicSparsification"},
        "layouts": {"dynamic-llava-classic": ".checkpoint:DynamicLlavaLayout"},
    },
)
