"""``python -m headrace``: the command line, for starters such as torchrun that take a module."""

from headrace.cli import main

if __name__ == "__main__":
    main()
