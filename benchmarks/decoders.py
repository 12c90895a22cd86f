"""Text and conversations with a small real Llama: prefix tuning, LoRA and full fine-tuning of stories260K.

    python benchmarks/decoders.py              what is missing, most telling first, at most two hours
    python benchmarks/decoders.py --list       what is there
    python benchmarks/decoders.py --only chat

Every run is a cell in benchmarks/cells; the tables in docs/results.md are made from them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.cells import Cell, Spec, Store
from harness.command import Benchmark, main
from harness.data import HASHES
from harness.progress import Line
from harness.stories import SHA256, run_stories
from harness.studies import Study
from harness.tables import chosen_of, markdown, measured_on, parameters, spread

STEPS = {"max_steps": 300, "per_device_train_batch_size": 16, "group_by_length": True}
SCHEDULE = {"lr_scheduler_type": "linear", "warmup_ratio": 0.06, "weight_decay": 0.0, "max_grad_norm": 1.0}
SEEDS = (0, 1, 2)
RECIPE = 1  # raise it when a change of code changes what a cell computes: all cells are run again

# method -> (its options, its grid, the likeliest value first)
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "base": ({}, ()),
    "prefix": ({"method": "prefix_tuning", "num_virtual_tokens": 20}, (3e-2, 1e-2, 1e-1, 3e-3)),
    "lora": ({"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, (1e-2, 3e-3, 3e-2, 1e-3)),
    "full": ({"method": "full"}, (3e-3, 1e-3, 1e-2, 3e-4)),
}
NAMES = {
    "base": "the untouched base",
    "prefix": "prefix tuning, 20 virtual tokens",
    "lora": "LoRA r=8 on all linear layers",
    "full": "full fine-tuning",
}


@dataclass(frozen=True)
class Task:
    """What is learnt, with how much work, and what is shown of the test rows as (name in the result, digits)."""

    what: str
    data: tuple[str, ...]
    budget: dict[str, Any]
    quick: dict[str, Any]
    scores: tuple[tuple[str, int], ...]


TASKS = {
    "causal": Task(
        "Shakespeare's plays by a model that has read children's stories only",
        ("text/tiny_shakespeare",),
        {"train_rows": 2000, "dev_rows": 100, "test_rows": 200, "max_length": 256, **STEPS},
        {"train_rows": 40, "dev_rows": 4, "test_rows": 4, "max_steps": 3},
        (("perplexity", 2), ("loss", 3)),
    ),
    "chat": Task(
        "restaurant records as a user's message, texts as the assistant's",
        ("e2e/train", "e2e/dev", "e2e/test"),
        {"train_rows": 8000, "dev_rows": 300, "test_records": 200, "max_length": 384, **STEPS},
        {"train_rows": 40, "dev_rows": 4, "test_records": 4, "max_steps": 3},
        (("perplexity", 3), ("bleu", 1), ("bleu_swapped", 1), ("slots", 3), ("slots_swapped", 3)),
    ),
}


def studies(quick: bool = False) -> list[Study]:
    made = []
    for name, task in TASKS.items():
        budget = {**task.budget, **(task.quick if quick else {})}
        inputs = {"recipe": RECIPE, "base": SHA256, **{part: HASHES[part] for part in task.data}}
        for method, (options, grid) in METHODS.items():
            kept = ("test_rows", "test_records", "max_length")  # nothing else counts for what is not trained
            made.append(
                Study(
                    Spec(
                        "decoders", name, method, SEEDS[0],
                        budget if grid else {key: budget[key] for key in kept if key in budget},
                        {**options, **SCHEDULE} if grid else {},
                        inputs,
                    ),
                    grid=grid[:1] if quick else grid,
                    seeds=SEEDS if grid and not quick else SEEDS[:1],
                    score="loss",
                    lower_is_better=True,
                )
            )  # fmt: skip
    return made


def run(spec: Spec, work: Path, line: Line) -> dict[str, Any]:
    """The result of one cell."""
    return run_stories(spec, work, line)


# ------------------------------------------------------------------------------------------------------------- tables


def render(all_studies: Sequence[Study], store: Store) -> str:
    """Markdown of everything that is in the store."""
    done, size = sum(study.finished(store) for study in all_studies), sum(study.size for study in all_studies)
    cells = [cell for study in all_studies for cell in study.cells(store)]
    blocks = [f"{done} of {size} cells are there. {measured_on(cells)}".strip()]
    for name, task in TASKS.items():
        found = [(study, study.runs(store)) for study in all_studies if study.spec.task == name]
        lines = [_line(task, study, runs, store) for study, runs in found if runs]
        blocks.append(f"### {name}: {task.what}")
        blocks.append(_budget(next(study.spec.budget for study, _ in found if study.grid)))
        blocks.append(markdown(_columns(task), lines) if lines else "No cell yet.")
        blocks += _samples([(study, runs[0]) for study, runs in found if runs and "samples" in runs[0].result])
    return "\n\n".join(blocks)


def _columns(task: Task) -> list[str]:
    tests = [f"test {name.replace('_', ' ')}" for name, _ in task.scores]
    chosen = "chosen learning rate, of those tried"
    return ["method", "trained parameters", "seeds", chosen, "dev loss", *tests, "training seconds"]


def _line(task: Task, study: Study, runs: list[Cell], store: Store) -> list[str]:
    trains = bool(study.grid)
    tests = [spread([run.result["test"][score] for run in runs], digits) for score, digits in task.scores]
    return [
        NAMES[study.spec.method],
        parameters(runs[0].result) if trains else "",
        f"{len(runs)} of {len(study.seeds)}",
        chosen_of(study, store) if trains else "",
        spread([run.result["dev"]["loss"] for run in runs]) if trains else "",
        *tests,
        spread([run.result["train_seconds"] for run in runs], 0) if trains else "",
    ]


def _budget(budget: dict[str, Any]) -> str:
    if budget["max_steps"] < 100:
        return "A quick run: these figures mean nothing."
    tested = budget.get("test_rows", budget.get("test_records"))
    return (
        f"Budget of every method: {budget['max_steps']:,} steps of {budget['per_device_train_batch_size']} rows from "
        f"{budget['train_rows']:,}, at most {budget['max_length']} tokens a row; {budget['dev_rows']:,} others choose "
        f"the learning rate by their loss; scored on {tested:,} others."
    )


def _samples(found: list[tuple[Study, Cell]]) -> list[str]:
    """The same record as every method tells it, first seed."""
    if not found:
        return []
    record = found[0][1].result["samples"][0][0]
    told = [f"- {NAMES[study.spec.method]}: {cell.result['samples'][0][1]}" for study, cell in found]
    return ["\n".join([f"`{record}`", "", *told])]


BENCHMARK = Benchmark("decoders", __doc__.splitlines()[0] if __doc__ else "", studies, run, render)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
