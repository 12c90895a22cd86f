"""What a demo run shows in the terminal: a table, sample outputs, and where everything is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from deltatune.demo.grammar import Row
from deltatune.report.words import duration, share, size


def table(outcomes: Sequence[dict[str, Any]]) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("", no_wrap=True)
    for name in ("trains", "on disk", "time", "memory", "loss", "BLEU", "swapped", "names"):
        made.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        scores, trained = outcome["scores"], bool(outcome["history"])
        made.add_row(
            outcome["title"],
            share(outcome["trainable"], outcome["parameters"]),
            size(outcome["bytes"]) if trained else "-",
            duration(outcome["seconds"]) if trained else "-",
            size(outcome["peak_memory"]) if trained else "-",
            f"{outcome['dev_loss']:.3f}",
            f"{scores['bleu']:.1f}",
            f"{scores['swapped_bleu']:.1f}",
            f"{100 * scores['names']:.0f} %",
        )
    return made


def explain(out: Console) -> None:
    out.print(
        "trains: share of all parameters; loss: per token, on the dev set; BLEU: on the test set; swapped: BLEU of the "
        "same outputs against other records' entries; names: share of the records' names that stand in the outputs."
    )


def samples(out: Console, outcomes: Sequence[dict[str, Any]], rows: Sequence[Row], count: int) -> None:
    for index in range(count):
        out.print()
        out.print(f"[dim]record [/dim] {rows[index].input}", soft_wrap=True)
        out.print(f"[dim]entry  [/dim] {rows[index].target}", soft_wrap=True)
        for outcome in outcomes:
            out.print(f"[dim]{outcome['key']:<7}[/dim] {outcome['outputs'][index]}", soft_wrap=True, markup=True)
