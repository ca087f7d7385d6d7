"""`python -m maskwright`: the command line."""

from maskwright.cli import main

if __name__ == "__main__":
    main()
