"""`python -m deltatune.cli`: the command without its script, as launchers start it."""

from deltatune.cli import main

if __name__ == "__main__":
    main()
