"""Verbs that train, and that look ahead to it."""

from typing import Annotated

import typer

from deltatune.cli.verbs.options import SETTINGS, Json
from deltatune.cli.verbs.root import app

PANEL = "Train"


data = typer.Typer(help="Look at training data before it is trained on.", no_args_is_help=True)
app.add_typer(data, name="data", rich_help_panel=PANEL)


@data.command(context_settings=SETTINGS)
def check(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]... [--NAME VALUE]...", help="Data files, and the settings of the run."),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="Settings file of the run.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows of each part to show, as tokens.")] = 2,
    as_json: Json = False,
) -> None:
    """What would be trained on: tokens and what is learnt of them, lengths, duplicates, leaks, faulty rows."""
    from deltatune.cli.data import check as run

    run(words or [], config, samples, as_json)


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [--NAME VALUE | NAME=VALUE]...", help="Settings file and settings."),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="Settings file, YAML or JSON.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--dry_run", help="Check everything; train nothing.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", "--print_config", help="Print all settings as YAML.")
    ] = False,
    launcher: Annotated[str | None, typer.Option(help="torchrun or accelerate: start several processes.")] = None,
    nproc_per_node: Annotated[
        int | None,
        typer.Option("--nproc_per_node", "--nproc-per-node", min=1, help="Processes on this machine: one a device."),
    ] = None,
    nnodes: Annotated[int, typer.Option(min=1, help="Machines; the command is started on each.")] = 1,
    node_rank: Annotated[
        int, typer.Option("--node_rank", "--node-rank", min=0, help="Which of the machines this is, from 0.")
    ] = 0,
    master_addr: Annotated[
        str | None, typer.Option("--master_addr", "--master-addr", help="Address of machine 0.")
    ] = None,
    master_port: Annotated[
        int | None, typer.Option("--master_port", "--master-port", help="Port of machine 0 that is free.")
    ] = None,
) -> None:
    """Train an adapter on a data file. Settings and their names: docs/cli.md or --print-config."""
    from deltatune.cli.launch import Launch
    from deltatune.cli.train import train as run

    how = Launch(launcher, nproc_per_node, nnodes, node_rank, master_addr, master_port)
    run(words or [], config, dry_run, print_config, how)


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def plan(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [--NAME VALUE | NAME=VALUE]...", help="Settings of the run, as for train."),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="Settings file, YAML or JSON.")] = None,
    target: Annotated[
        str | None, typer.Option("--for", help="cpu, cuda, or a device by name: a100-80, h100, rtx4090, ...")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--device-memory", "--device_memory", help="24GB; shows what fits into it.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="What each of so many devices would hold and send.")] = 1,
    probing: Annotated[bool, typer.Option("--probe", help="Load the weights and time a few small steps here.")] = False,
    as_json: Json = False,
) -> None:
    """Memory and time of a training run before it runs, and which settings fit. Exit code 4 where it does not."""
    from deltatune.cli.plan import plan as run

    if not run(words or [], config, target, memory, devices, probing, as_json):
        raise typer.Exit(4)


@app.command(context_settings=SETTINGS, rich_help_panel=PANEL)
def compare(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] --methods A,B,... [--seeds N] [--NAME VALUE]...",
            help="Settings of the comparison and of its runs, as for train.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Several methods on your own rows, over several seeds: which is better, at what cost, and what is within noise."""
    from deltatune.cli.compare import run

    run(words or [], as_json)
