"""The phantom world: procedural, seeded data on which every system can be trained and checked without a download."""

from llavakit.registry import WORLDS

WORLDS.add("thorax", "llavakit.phantom.thorax:Thorax")
WORLDS.add("scene", "llavakit.phantom.scene:Scene")
WORLDS.add("procedure", "llavakit.phantom.procedure:Procedure")
