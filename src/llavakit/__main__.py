"""`python -m llavakit` is the `llavakit` command."""

from llavakit.cli.app import main

if __name__ == "__main__":
    main()
