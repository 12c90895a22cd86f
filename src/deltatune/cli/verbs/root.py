"""The command itself: what stands before any verb."""

import os
from typing import Annotated

import typer

from deltatune.cli.failures import Verbs
from deltatune.cli.show import warnings_as_lines

app = typer.Typer(
    cls=Verbs,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"deltatune {version('deltatune')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def verbs(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure (with any verb).")] = False,
) -> None:
    """Parameter-efficient fine-tuning: train small adapters on a frozen model, use them, look inside."""
    warnings_as_lines()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if context.invoked_subcommand is None:
        print(context.get_help())
