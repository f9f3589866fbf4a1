"""The `llavakit` command."""
