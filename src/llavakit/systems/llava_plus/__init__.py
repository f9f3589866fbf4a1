"""LLaVA-Plus: a model that calls tools, with thoughts, actions and value in three lines."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-plus",
    title="LLaVA-Plus",
    paper="2311.05437",
    summary="A model that calls detectors, readers and editors of pictures, and answers with what they find.",
    claims=(
        Claim("Results of all tools in the prompt beat tools called on demand, which beat no tools.", "table 4"),
        Claim("Tools at test alone, without training on them, make the model worse.", "table 4"),
    ),
    checkpoints=("LLaVA-VL/llava_plus_v0_7b",),
    parts={
        "layouts": {"llava-plus": ".checkpoint:LlavaPlusLayout"},
        "codecs": {"llava_plus": ".grammar:ThreeLines"},
        "label_policies": {"counted_turns": ".labels:CountedTurns"},
        "preparations": {
            "llava_plus": ".records:training_records",
            "llava_plus_grounding": ".records:grounding_records",
            "llava_plus_scenes": ".records:scene_records",
        },
        "skills": {
            "llava_plus_detector": ".workers:detector_skill",
            "llava_plus_reader": ".workers:reader_skill",
            "llava_plus_segmenter": ".workers:segmenter_skill",
        },
    },
    codec="llava_plus",
    responder=".agent:ToolUser",
)
