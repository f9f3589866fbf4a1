"""LLaVA-Interactive: chat about a picture, and segment, remove, move, insert and create in it, in one session."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-interactive",
    title="LLaVA-Interactive",
    paper="2311.00571",
    summary="Edit a picture with brush, boxes and words, and talk about what it has become.",
    claims=(
        Claim(
            "Marks in the picture and one shared working image let people finish edits that words alone specify badly.",
            "section 1",
        ),
    ),
)
