"""Options that several verbs have."""

from typing import Annotated

import typer

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
