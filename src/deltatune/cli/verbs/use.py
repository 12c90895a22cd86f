"""Verbs that ask a model and its adapters."""

from typing import Annotated

import typer

from deltatune.cli.verbs.options import (
    BatchSize,
    Json,
    MaxNewTokens,
    Model,
    NumBeams,
    Sample,
    Seed,
    Separator,
    Temperature,
    TopK,
    TopP,
)
from deltatune.cli.verbs.root import app

PANEL = "Use"


@app.command(rich_help_panel=PANEL)
def generate(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or a model without adapter (folder, hub name).")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Inputs; without any, lines of stdin.")] = None,
    further: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="Another adapter on the same base; may be repeated.")
    ] = None,
    model: Model = None,
    separator: Separator = None,
    file: Annotated[str | None, typer.Option("--file", "-f", help="Inputs from a jsonl, csv or txt file.")] = None,
    column: Annotated[str | None, typer.Option(help="Column of the file that holds the input.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write jsonl here.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answer too.")] = False,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = 1,
    sample: Sample = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 42,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Answer inputs with an adapter, or several, on their base model; classifiers give their label."""
    from deltatune.cli.generate import generate as run
    from deltatune.generate.decoding import Decoding

    decoding = Decoding(max_new_tokens, num_beams, sample, temperature, top_p, top_k, seed, batch_size)
    run([adapter, *(further or [])], prompts or [], model, separator, file, column, output, compare, decoding, as_json)


app.command(name="infer", hidden=True)(generate)


@app.command(name="eval", rich_help_panel=PANEL)
def evaluate(
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Adapter folders, also as NAME=FOLDER.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", "--file", "-f", "--eval_file", help="Rows, as for train; may be repeated."),
    ] = None,
    model: Model = None,
    task: Annotated[str | None, typer.Option(help="Of a base without adapters.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="NAME=NAME_IN_THE_FILE, such as prompt=question.")] = None,
    separator: Separator = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Ask the base too.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="So many rows, evenly spread.")] = None,
    answers: Annotated[bool, typer.Option("--answers/--no-answers", help="Write answers and score them.")] = True,
    forgetting: Annotated[str | None, typer.Option(help="Loss on this neutral text: a file, or builtin.")] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", "--lm_eval", help="Tasks of lm-evaluation-harness, with commas.")
    ] = None,
    lm_eval_limit: Annotated[int | None, typer.Option("--lm-eval-limit", min=1, help="Rows of each of them.")] = None,
    lm_eval_include: Annotated[str | None, typer.Option("--lm-eval-include", help="Folder with your tasks.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Inputs to show with all answers.")] = 2,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws for the intervals.")] = 1000,
    seed: Seed = 42,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = 1,
    batch_size: BatchSize = 16,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write JSON here.")] = None,
    as_json: Json = False,
) -> None:
    """Score the base and adapters side by side on one data file, with intervals; what they forgot."""
    from deltatune.cli.evaluate import evaluate as run

    run(
        adapters or [],
        data or [],
        column or [],
        lm_eval,
        output,
        as_json,
        model=model,
        task=task,
        separator=separator,
        base=base,
        limit=limit,
        answers=answers,
        forgetting=forgetting,
        lm_eval_limit=lm_eval_limit,
        lm_eval_include=lm_eval_include,
        num_samples=samples,
        draws=draws,
        seed=seed,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        batch_size=batch_size,
    )


app.command(name="evaluate", hidden=True)(evaluate)


@app.command(rich_help_panel=PANEL)
def chat(
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Adapter folders, also as NAME=FOLDER.")
    ] = None,
    model: Model = None,
    separator: Separator = None,
    template: Annotated[
        str | None,
        typer.Option("--chat-template", "--chat_template", help="chatml, plain or a jinja file; default: its own."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: MaxNewTokens = None,
    sample: Sample = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 42,
) -> None:
    """Talk with the base and adapters, switching between them; /help inside lists the commands."""
    from deltatune.cli.chat import chat as run
    from deltatune.generate.decoding import Decoding

    decoding = Decoding(max_new_tokens, 1, sample, temperature, top_p, top_k, seed, 1)
    run(adapters or [], model, separator, template, system, decoding)
