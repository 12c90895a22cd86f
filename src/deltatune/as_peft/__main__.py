"""`python -m deltatune.as_peft program.py [args]`, or `-m module [args]`: a program with deltatune as its `peft`."""

from __future__ import annotations

import os
import runpy
import sys

USAGE = "usage: python -m deltatune.as_peft (program.py | -m module) [arguments of the program]"


def main(arguments: list[str]) -> None:
    """Run the program as Python itself would: its arguments, its folder first on the path, `__main__` as its name."""
    if not arguments or arguments == ["-m"] or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        if not os.path.exists(arguments[0]):
            sys.exit(f"deltatune.as_peft: no such program: {arguments[0]}")
        sys.argv = list(arguments)
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
