"""Editing pictures in sessions: marks, masks, layouts, versions, and a chat about what the picture has become.

`session` is where to begin; `backends` does the work with the skills of `llavakit.tools`.
"""
