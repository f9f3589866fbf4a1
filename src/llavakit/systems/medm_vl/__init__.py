"""MedM-VL: small medical assistants for 2D images and for chest CT volumes."""

from pathlib import Path

from llavakit.system import Claim, System

_HERE = Path(__file__).parent
_PACKAGE = "llavakit.systems.medm_vl"

SYSTEM = System(
    slug="medm-vl",
    title="MedM-VL",
    paper="2504.04323",
    summary="Ask about medical images and CT volumes with 3B models; a kit of encoders, connectors and decoders.",
    claims=(Claim("The design of the connector decides what of a volume's third dimension survives.", "section 4"),),
    checkpoints=("shiym2000/MedM-VL-2D-3B-en", "shiym2000/MedM-VL-CT-Chest-3B-en"),
    parts={
        "encoders": {
            "m3d_clip_vision": f"{_PACKAGE}.encoders:M3DClipVision",
            "medm_clip_vision": f"{_PACKAGE}.encoders:MedMClipVision",
        },
        "planners": {"volume_box": f"{_PACKAGE}.volumes:Box", "volume_slices": f"{_PACKAGE}.volumes:Slices"},
        "connectors": {"attention_pooling": f"{_PACKAGE}.connector:AttentionPooling"},
        "benchmarks": {"ct_rate": f"{_PACKAGE}.benchmarks:CTRateChoice"},
        "layouts": {"medm-vl": f"{_PACKAGE}.checkpoint:Published"},
    },
    parity=f"{_PACKAGE}.parity:ADAPTERS",
    cost=f"{_PACKAGE}.cost:cost",
    miniature=f"{_PACKAGE}.miniature:run",
    checkpoint=f"{_PACKAGE}.checkpoint:Published",
    recipe=_HERE / "recipe.yaml",
    readme=_HERE / "README.md",
)
