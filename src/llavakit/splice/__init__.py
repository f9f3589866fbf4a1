"""Where visual tokens, separators and newlines go in the embedded prompt."""
