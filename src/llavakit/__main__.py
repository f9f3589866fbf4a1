"""`python -m llavakit` is the `llavakit` command."""

from llavakit.cli import main

if __name__ == "__main__":
    main()
