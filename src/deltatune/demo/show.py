"""What a demo run shows in the terminal: a table, sample outputs, and where everything is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltatune.demo.grammar import Row
from deltatune.report.words import share


def table(outcomes: Sequence[dict[str, Any]]) -> Table:
    made = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    made.add_column("", no_wrap=True)
    for name in ("trains", "steps", "time", "memory", "on disk", "loss", "BLEU", "swapped", "names"):
        made.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        scores = outcome["scores"]
        cost = ("0 %", *"----")
        if outcome["history"]:
            memory, disk = (_size(outcome[key]) for key in ("peak_memory", "bytes"))
            trains = share(outcome["trainable"], outcome["parameters"])
            cost = (trains, str(outcome["steps"]), f"{outcome['seconds']:.0f} s", memory, disk)
        quality = (f"{outcome['dev_loss']:.3f}", f"{scores['bleu']:.1f}", f"{scores['swapped_bleu']:.1f}")
        made.add_row(outcome["title"], *cost, *quality, f"{100 * scores['names']:.0f} %")
    return made


def _size(count: float) -> str:
    """Whole megabytes or kilobytes: the table has eighty columns to fit in."""
    return (
        f"{count / 1e6:.0f} MB"
        if count >= 1e7
        else f"{count / 1e6:.1f} MB"
        if count >= 1e6
        else f"{count / 1e3:.0f} KB"
    )


def explain(out: Console) -> None:
    out.print(
        "trains: share of all parameters; loss: per token, on the dev set; BLEU: on the test set; swapped: BLEU of the "
        "same outputs against other records' entries; names: share of the records' names that stand in the outputs."
    )


def samples(out: Console, outcomes: Sequence[dict[str, Any]], rows: Sequence[Row], count: int) -> None:
    for index in range(count):
        out.print()
        out.print(Text.assemble(("record  ", "dim"), rows[index].input), soft_wrap=True)
        out.print(Text.assemble(("entry   ", "dim"), rows[index].target), soft_wrap=True)
        for outcome in outcomes:
            out.print(Text.assemble((f"{outcome['key']:<8}", "dim"), outcome["outputs"][index]), soft_wrap=True)
