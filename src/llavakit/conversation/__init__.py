"""Conversations: messages, chat templates, token ids and label masks. Nothing here sees pixels."""

from llavakit.conversation import builtin as _builtin  # noqa: F401  registers the templates
from llavakit.conversation.messages import from_llava, media_of, normalise, to_llava
from llavakit.conversation.template import Template, get_template

__all__ = ["Template", "from_llava", "get_template", "media_of", "normalise", "to_llava"]
