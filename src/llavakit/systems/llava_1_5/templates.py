"""Templates whose labels repeat a miscount of the published code, for comparison with runs of that code."""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.template import Template, get_template


def _miscounted(name: str) -> Template:
    """The published `preprocess_mpt` forgets the token that closes a round, and so masks every ordinary sample."""
    template = get_template(name)
    rounds = replace(template.rounds, counts_end=False, answer_offset=-1)
    return replace(template, name=f"{name}_miscounted", labels="rounds", rounds=rounds)


MPT = _miscounted("mpt")
CHATML_DIRECT = _miscounted("chatml_direct")
