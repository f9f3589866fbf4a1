"""KG-LLaVA: reasons for findings in chest radiographs, with triplets of a knowledge graph in front of the question."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="kg-llava",
    title="KG-LLaVA",
    paper="2410.04749",
    summary="The reason for a finding in a chest radiograph, with relations retrieved for the picture.",
    claims=(
        Claim(
            "Triplets of a knowledge graph that are retrieved for a picture make explanations of its findings better.",
            "Abstract; tables of KG-LLaVA, Med-XPT and Bio-LLaVA with and without the knowledge graph",
        ),
    ),
    parts={
        "encoders": {"medclip_vision": ".medclip:MedClipVision"},
        "planners": {"grey_square": ".medclip:GreySquare"},
        "connectors": {"prefix_mapper": ".captioner:PrefixMapper"},
        "store_encoders": {"medclip": ".medclip:MedClipEncoder"},
        "layouts": {"clip_caption": ".checkpoint:ClipCaption"},
        "preparations": {
            "medclip": ".medclip:medclip",
            "kg_datastore": ".datastore:kg_datastore",
            "kg_triplets": ".datastore:kg_triplets",
            "kg_conversations": ".prompts:kg_conversations",
        },
    },
    responder=".responder:WithTriplets",
)
