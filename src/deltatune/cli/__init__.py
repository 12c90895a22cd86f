"""The command `deltatune`: thin verbs over the library. What is heavy is imported by the verb that needs it."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line and exit with its code (see `deltatune.cli.failures`)."""
    from deltatune.cli.app import app

    app(args=None if arguments is None else list(arguments), prog_name="deltatune")
