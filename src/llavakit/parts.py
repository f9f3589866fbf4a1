"""The built-in parts by name, as places to import from on first use.

Importing this module registers them and imports nothing heavy. Parts that only one published system has are listed
on that system's card instead.
"""

from __future__ import annotations

from llavakit.registry import ARRANGEMENTS, ENCODERS, PLANNERS

ENCODERS.add("llavakit_multiscale", "llavakit.vision.multiscale:MultiscaleTower")

PLANNERS.add("square", "llavakit.views.image:Square")
PLANNERS.add("pad", "llavakit.views.image:Pad")
PLANNERS.add("squash", "llavakit.views.image:Squash")
PLANNERS.add("anyres", "llavakit.views.image:AnyRes")
PLANNERS.add("frames", "llavakit.views.frames:Frames")

ARRANGEMENTS.add("spatial", "llavakit.model.arrange_tiles:Spatial")
ARRANGEMENTS.add("spatial_unpad", "llavakit.model.arrange_tiles:SpatialUnpad")
ARRANGEMENTS.add("frames", "llavakit.model.arrange_tiles:Frames")
ARRANGEMENTS.add("faster_video", "llavakit.model.arrange_tiles:FasterVideo")
