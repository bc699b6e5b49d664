"""`python -m sqcompile`: the command line."""

from sqcompile.cli import main

if __name__ == "__main__":
    main()
