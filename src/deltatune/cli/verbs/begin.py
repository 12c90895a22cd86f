"""Verbs to begin with."""

from typing import Annotated

import typer

from deltatune.cli.verbs.options import Json
from deltatune.cli.verbs.root import app

PANEL = "Begin"


def _methods(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from deltatune.train.method import method_names

    return [name for name in method_names() if name.startswith(incomplete)]


def _recipes(incomplete: str) -> list[str]:
    from deltatune.recipes import TASKS

    return [name for name in TASKS if name.startswith(incomplete)]


@app.command(rich_help_panel=PANEL)
def demo(
    output: Annotated[
        str, typer.Option("--output", "-o", "--output_dir", "--output-dir", help="Folder for everything.")
    ] = "outputs/demo",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that all parts work.")] = False,
) -> None:
    """Prefix tuning, LoRA and full fine-tuning of the embedded model, side by side."""
    from deltatune.cli.demo import demo as run

    run(output, quick)


@app.command(rich_help_panel=PANEL)
def init(
    task: Annotated[str | None, typer.Argument(help="Without one: the list.", autocompletion=_recipes)] = None,
    method: Annotated[str, typer.Option(help="Of fine-tuning.", autocompletion=_methods)] = "lora",
    listed: Annotated[bool, typer.Option("--list", help="List tasks and methods.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="A new file, instead of stdout.")] = None,
) -> None:
    """A settings file to begin with, with comments: deltatune init classification > run.yaml"""
    from deltatune.cli.recipes import init as run

    run(None if listed else task, method, output)


@app.command(name="config-schema", rich_help_panel=PANEL)
def config_schema(
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write it here.")] = None,
) -> None:
    """The settings of train as JSON schema, options of all methods included, for editors."""
    from deltatune.cli.recipes import config_schema as run

    run(output)


@app.command(rich_help_panel=PANEL)
def env(as_json: Json = False) -> None:
    """Versions, devices, threads and memory."""
    from deltatune.cli.env import env as run

    run(as_json)
