"""Surgical-LLaVA: a clip of any length as one token per frame and one per patch."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="surgical-llava",
    title="Surgical-LLaVA",
    paper="2410.09750",
    summary="Questions about operations: a clip of up to 100 frames in 356 tokens, dialogues made from annotations.",
    claims=(
        Claim(
            "Averages over the patches of each frame and over the frames of each patch together keep what happens, "
            "where it is and in which order; neither alone does.",
            "section 3",
        ),
    ),
    checkpoints=("MBZUAI/Video-ChatGPT-7B",),
    parts={
        "connectors": {"spatio_temporal": ".connector:SpatioTemporal"},
        "templates": {
            "video_chatgpt_v1": ".templates:VIDEO_CHATGPT",
            "vicuna_v1_1": ".templates:VICUNA_V1_1",
            "vicuna_v1_1_front": ".templates:VICUNA_V1_1_FRONT",
            "video_chatgpt_default": ".templates:DEFAULT",
            "surgical_v1": ".templates:SURGICAL",
        },
        "benchmarks": {
            "endovis18_vqa": ".vqa:EndoVis18",
            "cholec80_vqa": ".vqa:Cholec80",
            "psi_ava_vqa": ".vqa:PsiAva",
        },
        "preparations": {
            "video_instruct": ".records:video_instruct",
            "surgical_dialogues": ".dialogues:surgical_dialogues",
        },
        "layouts": {"video-chatgpt": ".checkpoint:VideoChatGPT"},
    },
)
