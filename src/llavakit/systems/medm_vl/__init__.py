"""MedM-VL: small medical assistants for 2D images and for chest CT volumes."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="medm-vl",
    title="MedM-VL",
    paper="2504.04323",
    summary="Ask about medical images and CT volumes with 3B models; a kit of encoders, connectors and decoders.",
    claims=(Claim("The design of the connector decides what of a volume's third dimension survives.", "section 4"),),
    checkpoints=("shiym2000/MedM-VL-2D-3B-en", "shiym2000/MedM-VL-CT-Chest-3B-en"),
    parts={
        "encoders": {
            "m3d_clip_vision": ".encoders:M3DClipVision",
            "medm_clip_vision": ".encoders:MedMClipVision",
        },
        "planners": {"volume_box": ".volumes:Box", "volume_slices": ".volumes:Slices"},
        "connectors": {"attention_pooling": ".connector:AttentionPooling"},
        "benchmarks": {"ct_rate": ".benchmarks:CTRateChoice"},
        "templates": {
            name: f".templates:{name.upper()}"
            for name in ("vicuna_llama", "vicuna_llama_3", "vicuna_qwen_2", "vicuna_phi", "caption")
        },
        "layouts": {"medm-vl": ".checkpoint:Published"},
    },
)
