"""LLaVA-Mini: one vision token per image, by query compression and modality pre-fusion."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-mini",
    title="LLaVA-Mini",
    paper="2501.03895",
    summary="Pictures and hours of video at one token per image or frame, since the text reads all patches beforehand.",
    claims=(
        Claim(
            "One vision token in the language model is enough if the text reads all vision tokens in a few blocks in "
            "front of it; without these blocks it is not.",
            "sections 3 and 5.2, table 7",
        ),
        Claim("77 % fewer FLOPs than LLaVA-1.5 at 336 pixels.", "section 4.3, figure 6"),
    ),
    checkpoints=("ICTNLP/llava-mini-llama-3.1-8b",),
    parts={
        "planners": {"grid_and_whole": ".views:GridAndWhole"},
        "connectors": {"compressor_prefusion": ".connector:CompressorPrefusion"},
        "templates": {"llava_llama_3_1": ".templates:LLAVA_LLAMA_3_1"},
        "layouts": {"llava-mini-classic": ".checkpoint:LlavaMiniLayout"},
    },
)
