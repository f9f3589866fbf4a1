"""llava-zoom: an overview and a magnified middle in one block of tokens; answers are checked once."""

from llavakit import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-zoom",
    title="LLaVA-Zoom",
    paper="none",
    summary="See the middle of a picture in twice the detail, at no cost in prompt length.",
    claims=(Claim("Small objects in the middle are named more often.", "this README"),),
    parts={
        "planners": {"overview_and_middle": ".views:OverviewAndMiddle"},
        "connectors": {"gated_zoom": ".connector:GatedZoom"},
    },
    responder=".responder:SecondLook",
)
