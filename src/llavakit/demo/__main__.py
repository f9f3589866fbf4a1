"""`python -m llavakit.demo` runs the demo."""

from llavakit.demo.run import main

if __name__ == "__main__":
    main()
