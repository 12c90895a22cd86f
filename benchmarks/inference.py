"""What every method costs when a model answers: the prompt and each further token, beside PEFT's and the bare model.

    python benchmarks/inference.py                   all methods, the table and the picture of docs/performance.md
    python benchmarks/inference.py --only lora,dora --rounds 3

`generate` of 32 tokens after a prompt of 128, one row, greedy, on a Llama of 8 layers of width 512 with random weights.
"First token" is the time until it is there, "each further" the median of the others. Candidates: the bare model,
deltatune's adapter beside it, the same merged into it, PEFT's beside it, with the same config, the defaults of the
method. They take turns in one process with one thread; what counts is process CPU time, and of it the median of the
ratios within a round.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch
from harness import configs
from harness.alone import as_if_alone
from harness.llama import PACKAGES, ids_of
from harness.part import Found, Part, main
from harness.tables import markdown
from harness.timing import beside, in_turns, milliseconds, with_spread

from deltatune.errors import PeftError

PROMPT, NEW = 128, 32
COLUMNS = (
    "method",
    "each further token, ours / bare",
    "PEFT / bare",
    "first token, ours / bare",
    "PEFT / bare",
    "merged / bare",
)


class Clock:
    """A stopping criterion that never stops, and knows when each token was there."""

    def __init__(self, rows: int) -> None:
        self.begun, self.seen = time.process_time(), []
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.seen.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def first(self) -> float:
        return self.seen[0] - self.begun

    def further(self) -> float:
        return statistics.median(after - before for before, after in zip(self.seen, self.seen[1:]))


def answer(model: Any, ids: torch.Tensor, **options: Any) -> tuple[float, float]:
    """Seconds until the first token, and for each further one."""
    clock = Clock(len(ids))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[clock],
            **options,
        )
    return clock.first(), clock.further()


def measure(name: str, rounds: int, quick: bool) -> Found:
    shape = "tiny" if quick else "wide"
    with tempfile.TemporaryDirectory() as place:
        bare = configs.base(name, shape)
        models, unable = {"bare": bare}, {}
        for package in PACKAGES:
            if package == "deltatune" or configs.known_to_peer(name):
                models[package] = configs.build(package, name, configs.base(name, shape), Path(place)).eval()
        merged = _merged(partial(configs.build, "deltatune", name, configs.base(name, shape), Path(place)), unable)
        models |= {} if merged is None else {"merged": merged}
        ids, given = ids_of(1, 16 if quick else PROMPT), configs.options(name, 1)
        asked = {w: partial(answer, model, ids, **(given if w in PACKAGES else {})) for w, model in models.items()}
        times = in_turns(asked, rounds, within=as_if_alone)
    found = {
        what: beside({which: [each[place] for each in of] for which, of in times.items()}, "bare")
        for place, what in enumerate(("first", "further"))
    }
    return {**found, "merged": unable.get("merged", True)}


def _merged(build: Callable[[], Any], unable: dict[str, str]) -> Any:
    """The base with the adapter in its weights; None, and the reason noted, where no weight can hold it."""
    try:
        return build().eval().merge_and_unload()
    except PeftError as error:
        unable["merged"] = str(error)
        return None


def row(name: str, found: Found) -> list[str]:
    def cell(what: str, which: str) -> str:
        return with_spread(found[what].get(which, {}).get("ratio"))

    pairs = [cell(what, which) for what in ("further", "first") for which in ("deltatune", "peft")]
    return [name, *pairs, cell("further", "merged") or "no"]


def tables(kept: Found) -> dict[str, str]:
    first, further = (
        milliseconds(statistics.median(found[what]["bare"]["seconds"]["median"] for found in kept.values()))
        for what in ("first", "further")
    )
    told = f"The bare model: {first} until the first token, {further} for each further one."
    return {"inference": f"{markdown(COLUMNS, [row(name, kept[name]) for name in _cheapest_first(kept)])}\n\n{told}"}


def _cheapest_first(kept: Found) -> list[str]:
    return sorted(kept, key=lambda name: kept[name]["further"]["deltatune"]["ratio"]["median"])


def pictures(kept: Found) -> dict[str, Any]:
    from harness.pictures import dots, figure, legend, plain_ticks

    order = _cheapest_first(kept)
    made, axes = figure(columns=2, width=9.5, height=1.4 + 0.2 * len(order), sharey=True)
    for ax, what, title in zip(axes[0], ("further", "first"), ("each further token", "first token of 128")):
        found = {w: [kept[n][what].get(w, {}).get("ratio") for n in order] for w in ("deltatune", "peft", "merged")}
        dots(ax, order, found)
        ax.axvline(1, color="#777777", lw=1)
        ax.set_xscale("log")
        widest = max(value["high"] for values in found.values() for value in values if value)
        plain_ticks(ax.xaxis, [tick for tick in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64) if tick < widest * 1.2])
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("CPU time, in that of the bare model", fontsize=9)
    legend(made, axes[0][0])
    return {"inference": made}


PART = Part("inference", str(__doc__), 12, configs.names(), measure, tables, pictures, trial=("lora", "prefix_tuning"))

if __name__ == "__main__":
    main(PART)
