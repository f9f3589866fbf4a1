"""LLaVA-UHD (v1): images of any size and aspect ratio, in slices that follow the image."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-uhd",
    title="LLaVA-UHD",
    paper="2403.11703",
    summary="Pictures of any size and shape: native-aspect slices, few tokens each, an overview, a spatial schema.",
    claims=(
        Claim(
            "Slices that follow the image's shape beat a fixed grid and a low-resolution square, most of all on shapes "
            "far from the grid's.",
            "arXiv v1, tables 1 to 3",
        ),
        Claim("672 x 1088 pixels at 94 % of the compute of LLaVA-1.5 at 336 x 336.", "abstract of arXiv v1"),
    ),
    checkpoints=("guozonghao96/llava-uhd-144-13b",),
    parts={
        "planners": {"native_slices": ".partition:NativeSlices"},
        "connectors": {"spatial_resampler": ".resampler:SpatialResampler"},
        "arrangements": {"spatial_schema": ".schema:SpatialSchema"},
        "layouts": {"llava-uhd": ".checkpoint:Released"},
    },
)
