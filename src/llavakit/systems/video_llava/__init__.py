"""Video-LLaVA: pictures and short clips through encoders that were aligned before one projector reads both."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="video-llava",
    title="Video-LLaVA",
    paper="2311.10122",
    summary="Ask about pictures and short clips, in any mix in one conversation, with one projector for both.",
    claims=(
        Claim(
            "Encoders of pictures and of video that are aligned before projection let one projector serve both.",
            "sections 3.2 and 4.3",
        ),
        Claim("Training on pictures and videos together is better for both than either alone.", "section 4.3"),
    ),
    checkpoints=(
        "LanguageBind/Video-LLaVA-7B",
        "LanguageBind/Video-LLaVA-7B-hf",
        "LanguageBind/Video-LLaVA-Pretrain-7B",
    ),
    parts={
        "encoders": {"languagebind_video": ".encoder:LanguageBindVideo"},
        "planners": {"float_square": ".views:FloatSquare", "clip": ".views:Clip"},
        "encoder_files": {
            "LanguageBindVideo": ".encoder_files:LanguageBindFiles",
            "LanguageBindImage": ".encoder_files:LanguageBindImageFiles",
        },
        "layouts": {
            "video-llava": ".checkpoint:Published",
            "video-llava-hf": ".hf_checkpoint:VideoLlavaTransformersLayout",
        },
        "templates": {
            "video_llava": ".templates:INFERENCE",
            "video_llava_training": ".templates:TRAINING",
        },
    },
)
