"""Verbs that show what is inside."""

from typing import Annotated

import typer

from deltatune.cli.verbs.options import SETTINGS, Json, Model
from deltatune.cli.verbs.root import app

PANEL = "Look inside"


@app.command(rich_help_panel=PANEL)
def inspect(
    folder: Annotated[str, typer.Argument(help="Adapter folder or model folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """What an adapter folder or a model folder holds. An adapter needs no base model for it."""
    from deltatune.cli.inspect import inspect as run

    run(folder, tensors, as_json)


@app.command(rich_help_panel=PANEL)
def diff(
    first: Annotated[str, typer.Argument(help="Adapter folder.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    every: Annotated[bool, typer.Option("--all", help="Show every layer that differs.")] = False,
    as_json: Json = False,
) -> None:
    """How two adapters differ: options, layers, and how far apart they are. No base model is needed."""
    from deltatune.cli.diff import diff as run

    run(first, second, every, as_json)


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def trace(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADAPTER] [--NAME VALUE]...", help="Adapter folder; or options of a fresh adapter."),
    ] = None,
    model: Model = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="An input; may be repeated.")] = None,
    target: Annotated[list[str] | None, typer.Option("--target", help="What is to be answered; as many.")] = None,
    method: Annotated[str, typer.Option(help="Method of a fresh adapter.")] = "prefix_tuning",
    html: Annotated[str | None, typer.Option("--html", help="Write the page here as well.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Show all layers, not the first and last only.")] = False,
    as_json: Json = False,
) -> None:
    """One batch through an adapted model, stop by stop, with shapes and gradients."""
    from deltatune.cli.trace import trace as run

    run(words or [], model, text or [], target or [], method, html, every, as_json)
