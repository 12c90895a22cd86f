"""What candidates in one pass over one frozen base gain over as many runs, as batches grow.

    python benchmarks/compare.py                         all, and the table of docs/compare.md
    python benchmarks/compare.py --only 4x16 --rounds 3 --no-write

A Llama of 8 layers of width 512 with random weights, six LoRA candidates on all seven linear layers. One run after the
other: six models of one adapter each, steps as `deltatune.train` makes them. Both ways take turns in one process with
one thread; what counts is process CPU time of a whole step (forward, backward, clipping, update) of all six.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from harness import llama
from harness.tables import markdown, put_between
from harness.timing import ratio, turns
from torch import nn

from deltatune.compare.together import Together
from deltatune.data.collate import Collator
from deltatune.data.example import Columns
from deltatune.data.features import Features
from deltatune.data.prepare import Corpus, Part
from deltatune.train import TrainSettings
from deltatune.train.optim import build_optimizer

DOCUMENT = Path(__file__).parents[1] / "docs" / "compare.md"
RESULTS = Path(__file__).with_name("compare.json")
# rows and tokens of a candidate's batch
SIZES = {
    "1x16": (1, 16),
    "2x16": (2, 16),
    "4x16": (4, 16),
    "8x32": (8, 32),
    "8x64": (8, 64),
    "8x128": (8, 128),
}  # rows x tokens
RANKS = {"one rank": (8,) * 6, "six ranks": (2, 4, 8, 16, 32, 64)}
COLUMNS = ("rows x tokens of a candidate", "ranks", "six runs", "one pass", "gain", "chosen")


class Lone:
    """One candidate's steps in a model of its own, as a run makes them."""

    def __init__(self, run: Together) -> None:
        self.run, self.member = run, run.members[0]
        self.optimizer = build_optimizer(run.model, self.member.settings)  # as a run has it

    def step(self, rows: list[Features]) -> None:
        self.run.model.train()
        self.run.lone_loss(rows).backward()
        nn.utils.clip_grad_norm_(self.member.parameters, 1.0)
        self.optimizer.step()
        self.member.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(rows: int, tokens: int, ranks: tuple[int, ...], rounds: int) -> dict[str, float]:
    corpus = _corpus(rows, tokens)
    settings = [_settings(rows, rank) for rank in ranks]
    device = torch.device("cpu")
    at_once = Together(llama.bare("wide"), corpus, settings, device)
    alone = [Lone(Together(llama.bare("wide"), corpus, [one], device)) for one in settings]
    batch = corpus.train.features

    def one_by_one() -> None:
        for lone in alone:
            lone.step(batch)

    spent = turns({"alone": one_by_one, "at once": lambda: at_once.make_step([batch])}, rounds)
    return {"alone": min(spent["alone"]), "at_once": min(spent["at once"]), "gain": ratio(spent, "alone", "at once")}


def _corpus(rows: int, tokens: int) -> Corpus:
    ids = llama.ids_of(rows, tokens).tolist()
    features = [Features(row, [-100, *row[1:]], tokens - 1) for row in ids]
    part = Part("random", "", [], features)
    return Corpus("causal", Columns("text", ("text",)), part, collator=Collator(0, "causal"))


def _settings(rows: int, rank: int) -> TrainSettings:
    return TrainSettings(
        task="causal",
        method="lora",
        r=rank,
        lora_dropout=0.0,
        target_modules=llama.TARGETS,
        max_steps=10_000,
        per_device_train_batch_size=rows,
    )


def line(key: str, found: dict[str, Any]) -> list[str]:
    size, ranks = key.split(" ", 1)
    chosen = "one pass" if found["at_once"] <= found["alone"] else "six runs"
    return [size, ranks, f"{found['alone']:.3f} s", f"{found['at_once']:.3f} s", f"{found['gain']:.2f}", chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", help="sizes, separated by commas")
    parser.add_argument("--no-write", action="store_true", help="leave docs and compare.json as they are")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    keys = [f"{size} {ranks}" for size in SIZES for ranks in RANKS]
    for size in asked.only.split(",") if asked.only else SIZES:
        for name, ranks in RANKS.items():
            key = f"{size} {name}"
            stored[key] = measure(*SIZES[size], ranks, asked.rounds)
            print(*line(key, stored[key]), sep=" | ", flush=True)
            if asked.no_write:
                continue
            RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
            table = markdown(COLUMNS, [line(key, stored[key]) for key in keys if key in stored])
            DOCUMENT.write_text(put_between(DOCUMENT.read_text(), "one-pass", table, DOCUMENT.name))


if __name__ == "__main__":
    main()
