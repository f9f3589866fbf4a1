"""`python -m llavakit.cli` is the `llavakit` command, for launchers that start modules."""

from llavakit.cli.app import main

if __name__ == "__main__":
    main()
