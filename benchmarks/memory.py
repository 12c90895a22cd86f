"""What a training step of a language model holds in memory, with its loss in chunks and with its own, beside PEFT.

    python benchmarks/memory.py                       all, and the tables of docs/performance.md
    python benchmarks/memory.py --only bfloat16 --rounds 2 --no-write

A Llama of 8 layers of width 512 with random weights and a vocabulary of 32,768, 8 rows of 128 tokens, LoRA of rank 8 on
all seven linear layers. The floor is the frozen model: forward, the loss in chunks, and backward down to the output of
the embeddings. Peaks are tensors allocated at once beyond those there before the step, by the profiler's count; saved
is what forward leaves for backward, weights aside. Bytes are the same in every run. Time is CPU time of the process, of
which the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import peft
import step
import torch
import transformers
from harness.memory import peak_bytes, saved_bytes
from harness.tables import markdown, put_between
from harness.timing import cpu_seconds

import deltatune

RESULTS = Path(__file__).with_name("memory.json")
VOCABULARY = 32768
PEAKS = ("floor", "PEFT", "PEFT, chunked", "ours", "ours, chunked")
PEAK_COLUMNS = ("peak of a step", *PEAKS, "ours, chunked / PEFT", "ours / PEFT, both chunked")
SAVED_COLUMNS = ("saved for backward", *PEAKS, "ours, chunked / PEFT", "ours / PEFT, both chunked")
TIME_COLUMNS = ("time of a step, chunked / own", "frozen model", "ours")


class Candidate:
    """One model and its step, with the loss in chunks while `stage.enabled`."""

    def __init__(self, name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.frozen = name == "floor"
        if self.frozen:
            self.model: Any = step.bare(dtype, VOCABULARY).requires_grad_(False)
        else:
            package = {"PEFT": peft, "ours": deltatune}[name]
            self.model = step.adapted(package, dtype, options, VOCABULARY)
        self.stage = deltatune.chunk_loss(self.model)
        self.ids = torch.randint(0, VOCABULARY, (step.ROWS, step.TOKENS), generator=torch.Generator().manual_seed(0))

    def step(self) -> None:
        (step.floor if self.frozen else step.step)(self.model, self.ids)

    def forward(self) -> Any:
        if not self.frozen:
            return self.model(input_ids=self.ids, labels=self.ids)
        embedded = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
        return self.model(inputs_embeds=embedded, labels=self.ids)

    def saved_and_peak(self, chunked: bool) -> tuple[int, int]:
        self.stage.enabled = chunked
        self.model.zero_grad()
        return saved_bytes(self.model, self.forward), peak_bytes(self.step)

    def slowdown(self, rounds: int) -> float:
        """Time of a step in chunks over that with the model's own loss."""
        ratios = []
        for turn in range(-1, rounds):  # the first round goes unmeasured
            took = {}
            for self.stage.enabled in (True, False) if turn % 2 else (False, True):
                took[self.stage.enabled] = cpu_seconds(self.step)
            ratios.append(took[True] / took[False])
        return statistics.median(ratios[1:])


def measure(dtype: torch.dtype, options: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Bytes, and with `rounds` times."""
    found: dict[str, Any] = {"peak": {}, "saved": {}, "time": {}}
    for name in ("floor", "PEFT", "ours"):
        candidate = Candidate(name, dtype, options)
        if rounds and name != "PEFT":
            found["time"][name] = candidate.slowdown(rounds)
        for chunked in (True,) if name == "floor" else (True, False):
            label = f"{name}, chunked" if chunked and name != "floor" else name
            found["saved"][label], found["peak"][label] = candidate.saved_and_peak(chunked)
    return found


def bytes_row(name: str, found: dict[str, int], floor: int) -> list[str]:
    """Bytes, and two ratios of what is beyond `floor`."""
    ours = found["ours, chunked"] - floor
    ratios = [ours / (found[other] - floor) for other in ("PEFT", "PEFT, chunked")]
    return [name, *(f"{found[part] / 2**20:,.1f} MiB" for part in PEAKS), *(f"{ratio:.2f}" for ratio in ratios)]


def tables(stored: dict[str, Any]) -> str:
    names = [name for name in step.CASES if name in stored]
    peaks = [bytes_row(name, stored[name]["peak"], stored[name]["peak"]["floor"]) for name in names]
    saved = [bytes_row(name, stored[name]["saved"], 0) for name in names]
    timed = [name for name in names if stored[name]["time"]]
    times = [[name, *(f"{stored[name]['time'][part]:.2f}" for part in ("floor", "ours"))] for name in timed]
    parts = ((PEAK_COLUMNS, peaks), (SAVED_COLUMNS, saved), (TIME_COLUMNS, times))
    return "\n\n".join(markdown(columns, rows) for columns, rows in parts if rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="of the comparison of times; 0: keep those recorded")
    parser.add_argument("--only", help="cases, separated by commas")
    parser.add_argument("--no-write", action="store_true", help="leave docs and memory.json as they are")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in asked.only.split(",") if asked.only else step.CASES:
        found = measure(*step.CASES[name], asked.rounds)
        stored[name] = found if asked.rounds else {**found, "time": stored.get(name, {}).get("time", {})}
        print(tables({name: stored[name]}), flush=True)
        if asked.no_write:
            continue
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        document = step.DOCUMENT
        document.write_text(put_between(document.read_text(), "loss", tables(stored), document.name))


if __name__ == "__main__":
    main()
