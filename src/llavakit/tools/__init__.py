"""Tools: skills that models and people can call, and the protocols that carry calls (MCP both ways)."""

from llavakit.tools.artefacts import Artefacts
from llavakit.tools.configuration import load_toolbox
from llavakit.tools.skill import Outcome, Skill, SkillError
from llavakit.tools.toolbox import Limits, Result, Toolbox

__all__ = ["Artefacts", "Limits", "Outcome", "Result", "Skill", "SkillError", "Toolbox", "load_toolbox"]
