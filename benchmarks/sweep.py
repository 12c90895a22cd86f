"""What LoRA adds to a training step as batches, rows and ranks grow, beside the frozen model's floor and beside PEFT.

    python benchmarks/sweep.py                                     all, the table and the picture of docs/performance.md
    python benchmarks/sweep.py --only "float32 rows 8" --rounds 3

A Llama of 8 layers of width 512 with random weights, LoRA on all seven linear layers. The rank is 8 and a row has 128
tokens unless the line says otherwise; lines of other lengths have 2 rows, lines of other ranks 4. The floor is defined
in harness/floor.py. Candidates take turns in one process with one thread; what counts is process CPU time, and of it
the median of the ratios within a round.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
from harness.floor import floor, step
from harness.llama import PACKAGES, adapted, bare, ids_of, lora
from harness.part import Found, Part, main
from harness.tables import markdown
from harness.timing import beside, ratio, turns, with_spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SWEEPS: dict[str, tuple[int, ...]] = {
    "rows": (1, 2, 4, 8, 16),
    "tokens": (32, 64, 128, 256, 512, 1024),
    "rank": (4, 16, 64, 128),
}
KEYS = [f"{dtype} {what} {value}" for dtype in DTYPES for what, values in SWEEPS.items() for value in values]
COLUMNS = ("step", "floor", "PEFT / floor", "ours / floor", "ours / PEFT")


def parts_of(key: str) -> tuple[str, str, int]:
    dtype, what, value = key.split()
    return dtype, what, int(value)


def measure(key: str, rounds: int, quick: bool) -> Found:
    dtype, what, value = parts_of(key)
    rows = value if what == "rows" else 2 if what == "tokens" else 4
    ids = ids_of(rows, value if what == "tokens" else 128)
    model = partial(bare, "tiny" if quick else "wide", DTYPES[dtype])
    rank = value if what == "rank" else 8
    models = {package: adapted(package, lora(package, r=rank), model()).train() for package in PACKAGES}
    candidates = {package: partial(step, model, ids) for package, model in models.items()}
    spent = turns({"floor": partial(floor, model().train(), ids), **candidates}, rounds)
    return {**beside(spent, "floor"), "ours / PEFT": ratio(spent, "deltatune", "peft")}


def row(key: str, found: Found) -> list[str]:
    ratios = [with_spread(found[package]["ratio"]) for package in PACKAGES]
    return [key, f"{found['floor']['seconds']['median']:.3f} s", *ratios, f"{found['ours / PEFT']:.2f}"]


def tables(kept: Found) -> dict[str, str]:
    return {"sweep": markdown(COLUMNS, [row(key, found) for key, found in kept.items()])}


def pictures(kept: Found) -> dict[str, Any]:
    from harness.pictures import figure, legend, lines, plain_ticks

    titles = {"rows": "rows of 128 tokens", "tokens": "tokens in each of 2 rows", "rank": "rank, 4 rows of 128 tokens"}
    made, axes = figure(columns=3, rows=2, width=9.5, height=5.6, sharey="row", sharex="col")
    for place, dtype in enumerate(DTYPES):
        for column, what in enumerate(SWEEPS):
            there = {parts_of(key)[2]: found for key, found in kept.items() if parts_of(key)[:2] == (dtype, what)}
            ax = axes[place][column]
            ax.axhline(1, color="#777777", lw=1)
            lines(ax, {p: {value: found[p]["ratio"] for value, found in there.items()} for p in reversed(PACKAGES)})
            ax.set_xscale("log", base=2)
            plain_ticks(ax.xaxis, SWEEPS[what])
            if place:
                ax.set_xlabel(titles[what], fontsize=9)
        axes[place][0].set_ylabel(f"step / floor, {dtype}", fontsize=9)
    legend(made, axes[0][0])
    return {"sweep": made}


PART = Part("sweep", str(__doc__), 12, KEYS, measure, tables, pictures, trial=("float32 rows 1", "bfloat16 rank 4"))

if __name__ == "__main__":
    main(PART)
