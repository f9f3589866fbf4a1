"""The documented name of `llavakit.proof.cost`."""

from llavakit.proof.cost import *  # noqa: F403
