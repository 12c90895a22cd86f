"""The verbs and their options. Each hands over to a function in a file of its own, imported when it is called."""

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
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": True}
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Inputs = Annotated[list[str] | None, typer.Option("--input", "-i", help="What to prove it on; may be repeated.")]
InputFile = Annotated[str | None, typer.Option("--file", "-f", help="Inputs from a jsonl, csv or txt file.")]
Column = Annotated[str | None, typer.Option(help="Column of the file that holds the input.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Load what was written and compare.")]
Kl = Annotated[float | None, typer.Option("--tolerance", min=0.0, help="Largest KL divergence allowed, in nats.")]
Separator = Annotated[str | None, typer.Option(help="Between input and answer; default: as trained.")]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", "--max_new_tokens", min=1, help="Default: as trained.")
]
Sample = Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")]
Temperature = Annotated[float, typer.Option(min=0.0)]
TopP = Annotated[float, typer.Option("--top-p", "--top_p", min=0.0, max=1.0)]
TopK = Annotated[int, typer.Option("--top-k", "--top_k", min=0, help="0: no limit.")]
Seed = Annotated[int, typer.Option()]
NumBeams = Annotated[int, typer.Option("--num-beams", "--num_beams", min=1)]
BatchSize = Annotated[int, typer.Option("--batch-size", "--batch_size", min=1)]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Base model: folder, hub name or demo.")]


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


@app.command()
def demo(
    output: Annotated[
        str, typer.Option("--output", "-o", "--output_dir", "--output-dir", help="Folder for everything.")
    ] = "outputs/demo",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that all parts work.")] = False,
) -> None:
    """Prefix tuning, LoRA and full fine-tuning of the embedded model, side by side."""
    from deltatune.cli.demo import demo as run

    run(output, quick)


@app.command(context_settings=SETTINGS)
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


data = typer.Typer(help="Look at training data before it is trained on.", no_args_is_help=True)
app.add_typer(data, name="data")


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


@app.command()
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


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="Adapter folder or model folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """What an adapter folder or a model folder holds. An adapter needs no base model for it."""
    from deltatune.cli.inspect import inspect as run

    run(folder, tensors, as_json)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="Adapter folder.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    every: Annotated[bool, typer.Option("--all", help="Show every layer that differs.")] = False,
    as_json: Json = False,
) -> None:
    """How two adapters differ: options, layers, and how far apart they are. No base model is needed."""
    from deltatune.cli.diff import diff as run

    run(first, second, every, as_json)


@app.command(name="eval")
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


@app.command()
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


def _methods(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from deltatune.train.method import method_names

    return [name for name in method_names() if name.startswith(incomplete)]


def _recipes(incomplete: str) -> list[str]:
    from deltatune.recipes import TASKS

    return [name for name in TASKS if name.startswith(incomplete)]


@app.command()
def init(
    task: Annotated[str | None, typer.Argument(help="Without one: the list.", autocompletion=_recipes)] = None,
    method: Annotated[str, typer.Option(help="Of fine-tuning.", autocompletion=_methods)] = "lora",
    listed: Annotated[bool, typer.Option("--list", help="List tasks and methods.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="A new file, instead of stdout.")] = None,
) -> None:
    """A settings file to begin with, with comments: deltatune init classification > run.yaml"""
    from deltatune.cli.recipes import init as run

    run(None if listed else task, method, output)


@app.command(name="config-schema")
def config_schema(
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write it here.")] = None,
) -> None:
    """The settings of train as JSON schema, options of all methods included, for editors."""
    from deltatune.cli.recipes import config_schema as run

    run(output)


@app.command(context_settings=SETTINGS)
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


@app.command()
def env(as_json: Json = False) -> None:
    """Versions, devices, threads and memory."""
    from deltatune.cli.env import env as run

    run(as_json)


@app.command()
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


@app.command(context_settings=SETTINGS)
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


@app.command(context_settings=SETTINGS)
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
