"""Verbs that make an adapter ready for another program."""

from typing import Annotated

import typer

from deltatune.cli.verbs.options import Column, InputFile, Inputs, Json, Kl, Model, Verify
from deltatune.cli.verbs.root import app

PANEL = "Ship"


@app.command(rich_help_panel=PANEL)
def doctor(
    folder: Annotated[str, typer.Argument(help="Adapter folder.")],
    programs: Annotated[
        list[str] | None,
        typer.Option("--for", help="peft, vllm, sglang or llama.cpp; may be repeated. Fails where one would not do."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Whether other programs would load an adapter, and compute the same with it; if not, what to do."""
    from deltatune.cli.doctor import doctor as run

    run(folder, programs or [], as_json)


@app.command(rich_help_panel=PANEL)
def merge(
    adapter: Annotated[str, typer.Argument(help="Adapter folder.")],
    out: Annotated[str, typer.Argument(help="New folder for the model.")],
    model: Model = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the base's by default.")] = None,
    inputs: Inputs = None,
    file: InputFile = None,
    column: Column = None,
    verify: Verify = True,
    tolerance: Kl = None,
    as_json: Json = False,
) -> None:
    """Base and adapter as one plain model, proven against the two."""
    from deltatune.cli.ship import Asked
    from deltatune.cli.ship import merge as run

    run(adapter, out, dtype, Asked(model, inputs or (), file, column, verify, tolerance, as_json))


app.command(name="merge-lora", hidden=True)(merge)


@app.command(rich_help_panel=PANEL)
def convert(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, of any method that a weight can hold.")],
    out: Annotated[str, typer.Argument(help="New folder for the LoRA adapter.")],
    to: Annotated[str, typer.Option(help="lora")] = "lora",
    rank: Annotated[
        str | None, typer.Option(help="A rank, a share of energy such as 0.99, or auto: what --max-error needs.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", "--max_error", help="Of each layer's change; 1e-5 by default.")
    ] = None,
    model: Model = None,
    inputs: Inputs = None,
    file: InputFile = None,
    column: Column = None,
    verify: Verify = True,
    tolerance: Kl = None,
    as_json: Json = False,
) -> None:
    """An adapter of any method as plain LoRA, with the error of every layer, proven against itself."""
    from deltatune.cli.ship import Asked
    from deltatune.cli.ship import convert as run

    run(adapter, out, to, rank, max_error, Asked(model, inputs or (), file, column, verify, tolerance, as_json))


@app.command(rich_help_panel=PANEL)
def combine(
    words: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[=WEIGHT]... OUT", help="Adapter folders, or a YAML recipe; and a new folder."),
    ],
    type: Annotated[
        str | None,
        typer.Option("--type", help="linear (the exact sum), svd, cat, ties_svd, dare_linear_svd, dare_ties_svd, ..."),
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that pruning keeps.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the result.")] = None,
    sign: Annotated[str, typer.Option(help="What TIES elects by: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option(help="What DARE draws from.")] = 42,
    model: Model = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    eval_file: Annotated[
        str | None, typer.Option("--eval-file", "--eval_file", "-e", help="Score base, adapters and result on it.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", min=1)] = 16,
    as_json: Json = False,
) -> None:
    """Several adapters of one base as one: sums, TIES, DARE, SVD; also from a YAML file as mergekit has it."""
    from deltatune.cli.combine import combine as run
    from deltatune.cli.combine import recipe_of

    run(recipe_of(words[:-1], type, density, rank, sign, model, dtype), words[-1], eval_file, batch_size, seed, as_json)


@app.command(rich_help_panel=PANEL)
def export(
    adapter: Annotated[str, typer.Argument(help="Adapter folder.")],
    out: Annotated[str, typer.Argument(help="New folder.")],
    to: Annotated[str, typer.Option(help="peft, vllm, sglang, gguf or ollama.")],
    model: Model = None,
    inputs: Inputs = None,
    file: InputFile = None,
    column: Column = None,
    verify: Verify = True,
    tolerance: Kl = None,
    as_json: Json = False,
) -> None:
    """An adapter as another program reads it, judged by its rules, read back and proven."""
    from deltatune.cli.ship import Asked
    from deltatune.cli.ship import export as run

    run(adapter, out, to, Asked(model, inputs or (), file, column, verify, tolerance, as_json))
