"""What one unmerged LoRA adapter costs where text is generated, beside the bare model and beside PEFT.

    python benchmarks/decode.py                     and write decode.json
    python benchmarks/decode.py --only "512 step, 1 row" --no-write

LoRA r=8 on all linear layers of a Llama of 8 layers with random weights, 512 or 1024 wide. A step is one token for each
row, after 32 that are in the cache. "Products" is the bare model whose layers make the same three products and nothing
else: what three calls per layer cost, whoever makes them. Candidates take turns in one process with one thread; what
counts is process CPU time, of it the median of the ratios within a round and the ratio of the best.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import torch
import torch.nn.functional as F
import transformers

RESULTS = Path(__file__).with_name("decode.json")
NEW_TOKENS = 32
WIDTHS = (512, 1024)
ROWS = (1, 8)
adapters.SHAPES["1024"] = {**adapters.SHAPES["wide"], "hidden_size": 1024, "intermediate_size": 2752}
adapters.SHAPES["512"] = adapters.SHAPES["wide"]


class Products(torch.nn.Module):
    """A linear layer and B A x in three calls."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.A = layer.weight, torch.nn.Parameter(torch.randn(8, layer.in_features))
        self.B = torch.nn.Parameter(torch.randn(layer.out_features, 8) / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, A, B = self._parameters.values()
        y, h = F.linear(x, weight), F.linear(x, A)  # type: ignore[arg-type]
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, 8), B.T)  # type: ignore[union-attr]
        return y


def products(shape: str) -> Any:
    model = adapters.bare(shape)
    for module in list(model.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Products(child))
    return model


def generation(model: Any, rows: int) -> Callable[[], Any]:
    ids = torch.ones(rows, adapters.BEFORE, dtype=torch.long)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def measure(models: dict[str, Any], kind: str, rows: int, rounds: int) -> dict[str, Any]:
    make = adapters.step if kind == "step" else generation
    turns = {name: make(model, rows) for name, model in models.items()}
    names, spent = list(turns), {name: [] for name in turns}
    for turn in range(-2, rounds):  # the first two rounds go unmeasured
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = adapters.cpu_seconds(turns[name])
            if turn >= 0:
                spent[name].append(took)
    best = {name: min(values) for name, values in spent.items()}
    beside = {name: statistics.median(a / b for a, b in zip(spent[name], spent["bare"])) for name in names[1:]}
    return {
        "bare": best["bare"],
        "median": beside,
        "best": {name: best[name] / best["bare"] for name in names[1:]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of steps; of generations a quarter")
    parser.add_argument("--only", help="one case")
    parser.add_argument("--no-write", action="store_true", help="leave decode.json as it is")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for width in WIDTHS:
        names = {
            f"{width} {kind}, {rows} row{'s' * (rows > 1)}": (kind, rows)
            for kind in ("step", "generate")
            for rows in ROWS
        }
        if asked.only and asked.only not in names:
            continue
        shape = str(width)
        models = {"bare": adapters.bare(shape), "ours": adapters.adapted("deltatune", shape)}
        models |= {"peft": adapters.adapted("peft", shape), "products": products(shape)}
        for name, (kind, rows) in names.items():
            if asked.only in (None, name):
                rounds = asked.rounds if kind == "step" else max(asked.rounds // 4, 3)
                stored[name] = measure(models, kind, rows, rounds)
                shown = [f"{key} {value:.3f}" for key, value in stored[name]["median"].items()]
                print(name, adapters.milliseconds(stored[name]["bare"]), *shown, sep=" | ", flush=True)
    if not asked.no_write:
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
