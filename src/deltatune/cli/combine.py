"""`deltatune combine`: several adapters as one, and what each of them does on given rows."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltatune.cli.show import console, facts, quiet_libraries, table
from deltatune.errors import ConfigError
from deltatune.ship.recipe import Recipe, parts_of, read_recipe

LOSSY = 1e-3  # share of a layer that is worth telling


def recipe_of(
    words: Sequence[str],
    type: str | None,
    density: float | None,
    rank: int | None,
    sign: str,
    model: str | None,
    dtype: str | None,
) -> Recipe:
    """Adapters with weights, or one YAML file, on top of which only rank, base and dtype may be given."""
    if not words:
        raise ConfigError("give at least one adapter, and behind it the new folder", field="adapters")
    if len(words) > 1 or Path(words[0]).suffix not in (".yaml", ".yml"):
        return Recipe(parts_of(words, density), type or "linear", rank, sign, "mean", model, dtype)
    for name, value in (("type", type), ("density", density)):
        if value is not None:
            raise ConfigError(f"--{name} beside {words[0]}, which says it; keep one", field=name, found=value)
    read = read_recipe(words[0])
    return dataclasses.replace(read, rank=rank, sign_method=sign, base=model or read.base, dtype=dtype or read.dtype)


def combine(recipe: Recipe, out: str, eval_file: str | None, batch_size: int, seed: int, as_json: bool) -> None:
    from deltatune.ship import combine_adapters

    quiet_libraries()
    command = shlex.join(["deltatune", *sys.argv[1:]])
    made = combine_adapters(recipe, out, eval_file=eval_file, batch_size=batch_size, seed=seed, command=command)
    if as_json:
        print(json.dumps(asdict(made), indent=2, default=str))
        return
    lines: list[tuple[str, Any]] = [("adapter", made.folder), ("combined by", recipe.type), ("method", made.method)]
    lines += [("rank", made.rank)] if made.rank is not None else []
    worst = max(made.errors.items(), key=lambda item: item[1], default=("", 0.0))
    lines += [("lost to the rank", f"{worst[1]:.1%} of the change at {worst[0]}")] if worst[1] > LOSSY else []
    shown = console()
    shown.print(facts(lines))
    if made.scores:
        names = list(made.scores["result"])
        weights = {part.adapter: f"{part.weight:g}" for part in recipe.parts}
        rows = [
            (who, weights.get(who, ""), *(f"{scores[name]:.4g}" for name in names))
            for who, scores in made.scores.items()
        ]
        shown.print()
        shown.print(table((f"on {eval_file}", "weight", *names), rows, numbers="l" + "r" * (len(names) + 1)))
