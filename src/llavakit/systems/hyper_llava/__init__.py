"""HyperLLaVA: adapter weights generated for every input, in the connector and inside the language model."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="hyper-llava",
    title="HyperLLaVA",
    paper="2403.13447",
    summary="LLaVA-1.5 whose connector and upper language layers adapt to each picture and each question.",
    claims=(
        Claim(
            "Adapter weights that hypernetworks generate from the input beat static adapters of the same shape.",
            "section 4.3, tables 5 and 6",
        ),
    ),
    parts={
        "connectors": {"visual_expert_mlp": ".connector:VisualExpertMLP"},
        "adapters": {"language_experts": ".adapter:LanguageExperts"},
        "layouts": {"hyper-llava": ".checkpoint:HyperLlavaLayout"},
    },
)
