"""LLaVA-Med: a general model brought to biomedicine by a curriculum and data that a teacher writes from captions."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-med",
    title="LLaVA-Med",
    paper="2306.00890",
    summary="Questions about biomedical figures: captions first, then dialogues that a teacher writes from captions.",
    claims=(
        Claim(
            "A general model is nearly useless in a new domain until it is tuned on instructions there; captions alone "
            "do not make it answer questions, and more instructions help.",
            "table 4",
        ),
        Claim("Alignment on captions first, then instructions, is a good curriculum.", "section 4"),
    ),
    checkpoints=("microsoft/llava-med-v1.5-mistral-7b", "microsoft/llava-med-7b-delta"),
    parts={
        "layouts": {"llava-med-v1.5": ".checkpoint:MistralLayout", "llava-med-v1.0": ".checkpoint:FirstLayout"},
        "codecs": {"llava_med_role": ".replies:RoleCodec"},
        "planners": {"drawn_pad": ".views:DrawnPad"},
        "benchmarks": {
            "vqa_rad": ".vqa:VQARad",
            "slake": ".vqa:Slake",
            "path_vqa": ".vqa:PathVQA",
            "llava_med_chat": ".chat_eval:MedicalChat",
        },
        "preparations": {
            "medical_vqa": ".vqa_files:medical_vqa",
            "figure_captions": ".captions:figure_captions",
        },
        "pipelines": {"figure_dialogues": ".dialogues:FigureDialogues"},
        "templates": {
            "llava_med_simple": ".templates:SIMPLE",
            "llava_med_simple_unopened": ".templates:EVALUATION",
            "llava_med_simple_legacy": ".templates:SIMPLE_LEGACY",
            "llava_med_multimodal": ".templates:MULTIMODAL_SIMPLE",
            "llava_med_vicuna_v1_1": ".templates:VICUNA_V1_1",
            "llava_med_v1": ".templates:RESEARCH_V1",
            "llava_med_bair_v1": ".templates:BAIR_V1",
            "llava_med_1_5_vicuna_v1": ".templates:STRIPPED_USER",
            "llava_med_1_5_llava_v1": ".templates:STRIPPED_HUMAN",
            "llava_med_1_5_v1_mmtag": ".templates:STRIPPED_TAGS",
        },
    },
)
