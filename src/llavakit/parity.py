"""The documented name of `llavakit.proof.golden`."""

from llavakit.proof.golden import *  # noqa: F403
