"""What LoRA adds to a training step: beside the frozen model's own forward and backward pass, and beside PEFT.

    python benchmarks/step.py                         all, and the table of docs/performance.md
    python benchmarks/step.py --only plain --rounds 4 --no-write

A Llama of 8 layers of width 512 with random weights, 8 rows of 128 tokens, rank 8 on all seven linear layers. The floor
is the same model frozen (harness/floor.py). Candidates take turns in one process with one thread; what counts is
process CPU time, of it the median of the ratios within a round and the ratio of the best rounds.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import peft
import torch
import transformers
from harness import llama
from harness.floor import floor, step
from harness.tables import markdown, put_between
from harness.timing import ratio, turns

import deltatune

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
RESULTS = Path(__file__).with_name("step.json")
ROWS, TOKENS = 8, 128
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float32, {}),
    "dropout 0.1": (torch.float32, {"lora_dropout": 0.1}),
    "DoRA": (torch.float32, {"use_dora": True}),
    "bfloat16": (torch.bfloat16, {}),
}
COLUMNS = ("LoRA", "floor", "PEFT / floor", "best", "ours / floor", "best", "ours / PEFT")


def bare(dtype: torch.dtype, vocabulary: int = llama.WORDS) -> Any:
    return llama.bare("wide", dtype, vocab_size=vocabulary).train()


def adapted(package: Any, dtype: torch.dtype, options: dict[str, Any], vocabulary: int = llama.WORDS) -> Any:
    name = package.__name__
    return llama.adapted(name, llama.lora(name, **options), bare(dtype, vocabulary)).train()


def measure(dtype: torch.dtype, options: dict[str, Any], rounds: int) -> dict[str, float]:
    frozen = bare(dtype).requires_grad_(False)
    ours, peers = adapted(deltatune, dtype, options), adapted(peft, dtype, options)
    ids = torch.randint(0, 1024, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    candidates: dict[str, Callable[[], Any]] = {
        "floor": lambda: floor(frozen, ids),
        "peft": lambda: step(peers, ids),
        "ours": lambda: step(ours, ids),
    }
    spent = turns(candidates, rounds)
    best = {name: min(values) for name, values in spent.items()}
    return {
        "floor": best["floor"],
        "peft": ratio(spent, "peft", "floor"),
        "peft_best": best["peft"] / best["floor"],
        "ours": ratio(spent, "ours", "floor"),
        "ours_best": best["ours"] / best["floor"],
        "beside": ratio(spent, "ours", "peft"),
    }


def row(name: str, found: dict[str, float]) -> list[str]:
    ratios = [f"{found[key]:.2f}" for key in ("peft", "peft_best", "ours", "ours_best", "beside")]
    return [name, f"{found['floor']:.3f} s", *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", help="cases, separated by commas")
    parser.add_argument("--no-write", action="store_true", help="leave docs and step.json as they are")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in asked.only.split(",") if asked.only else CASES:
        stored[name] = measure(*CASES[name], asked.rounds)
        print(*row(name, stored[name]), sep=" | ", flush=True)
    if not asked.no_write:
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        lines = [row(name, stored[name]) for name in CASES if name in stored]
        DOCUMENT.write_text(put_between(DOCUMENT.read_text(), "step", markdown(COLUMNS, lines), DOCUMENT.name))


if __name__ == "__main__":
    main()
