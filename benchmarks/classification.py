"""Sequence classification with a real pretrained encoder: prefix tuning, LoRA, full fine-tuning, a linear probe.

    python benchmarks/classification.py              what is missing, most telling first, at most two hours
    python benchmarks/classification.py --list       what is there
    python benchmarks/classification.py --only banking77/lora

Every run is a cell in benchmarks/cells; the tables in docs/results.md are made from them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import minilm
from harness.cells import Spec, Store
from harness.command import Benchmark, main
from harness.data import HASHES, Row, rows, split, spread_over
from harness.progress import Line
from harness.studies import Study
from harness.tables import chosen_of, markdown, measured_on, parameters, spread

TASKS = {"sentence_polarity": "movie-review sentences, 2 classes", "banking77": "bank customers' questions, 77 classes"}

# One pass over the training rows for everybody. Rows are cut at 64 tokens, which shortens about one in a hundred.
STEPS = {"max_steps": 400, "per_device_train_batch_size": 16, "max_length": 64, "group_by_length": True}
BUDGET = {"train_rows": 6400, "dev_rows": 1000, "test_rows": None, **STEPS}
QUICK = {**BUDGET, "train_rows": 640, "dev_rows": 100, "test_rows": 200, "max_steps": 20}
SCHEDULE = {"lr_scheduler_type": "linear", "warmup_ratio": 0.06, "weight_decay": 0.0, "max_grad_norm": 1.0}

# method -> (its options, its grid, the likeliest value first). Three values for each: a factor of about three apart.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "prefix": ({"method": "prefix_tuning", "num_virtual_tokens": 20}, (3e-2, 1e-2, 1e-1)),
    "lora": ({"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}, (3e-3, 1e-3, 1e-2)),
    "full": ({"method": "full"}, (3e-4, 1e-4, 1e-3)),
    "probe": ({}, (0.01, 0.1, 1.0)),  # C of the logistic regression
}
NAMES = {
    "prefix": "prefix tuning, 20 virtual tokens, random start",
    "lora": "LoRA r=8 on query and value",
    "full": "full fine-tuning",
    "probe": "linear probe on frozen features",
}
SEEDS = (0, 1, 2)
RECIPE = 1  # raise it when a change of code changes what a cell computes: all cells are run again
EVAL_BATCH = 64  # changes no figure beyond rounding, so it is not part of a cell


def studies(quick: bool = False) -> list[Study]:
    made = []
    for task in TASKS:
        for method, (options, grid) in METHODS.items():
            hashes = {part: HASHES[f"{task}/{part}"] for part in ("train", "test")}
            inputs = {"recipe": RECIPE, "base": minilm.SHA256, **hashes}
            probe = method == "probe"
            hyper = options if probe else {**options, **SCHEDULE}
            made.append(
                Study(
                    Spec("classification", task, method, SEEDS[0], QUICK if quick else BUDGET, hyper, inputs),
                    knob="C" if probe else "learning_rate",
                    grid=grid[:1] if quick else grid,
                    seeds=SEEDS[:1] if probe or quick else SEEDS,  # nothing in the probe is random
                )
            )
    return made


def run(spec: Spec, work: Path, line: Line) -> dict[str, Any]:
    """The result of one cell."""
    budget = spec.budget
    folder = minilm.minilm_folder()
    train_rows, dev_rows = split(rows(f"{spec.task}/train"), budget["dev_rows"], budget["train_rows"])
    test_rows = spread_over(rows(f"{spec.task}/test"), budget["test_rows"] or sys.maxsize)
    if spec.method == "probe":
        from harness.probe import probe

        parts: dict[str, Sequence[Row]] = {"train": train_rows, "dev": dev_rows, "test": test_rows}
        return probe(folder, parts, spec.hyper["C"], budget["max_length"], EVAL_BATCH, line.tell)
    return _trained(spec, folder, work, line, train_rows, dev_rows, test_rows)


def _trained(
    spec: Spec, folder: Path, work: Path, line: Line, train_rows: list[Row], dev_rows: list[Row], test_rows: list[Row]
) -> dict[str, Any]:
    from harness.training import facts, in_folder, settings_of, train_cell

    fixed = {"model_name_or_path": str(folder), "task": "classification", "per_device_eval_batch_size": EVAL_BATCH}
    settings = {**fixed, **settings_of(spec)}
    result = in_folder(work, lambda place: train_cell(settings, place, line, train_rows, dev_rows, test_rows))
    after = result.metrics["after"]
    return {
        "dev": after["eval"],
        "test": after["test"],
        **facts(result, len(train_rows), spec.budget["per_device_train_batch_size"]),
    }


# ------------------------------------------------------------------------------------------------------------- tables


def render(all_studies: Sequence[Study], store: Store) -> str:
    """Markdown of everything that is in the store."""
    done, size = sum(study.finished(store) for study in all_studies), sum(study.size for study in all_studies)
    cells = [cell for study in all_studies for cell in study.cells(store)]
    blocks = [f"{done} of {size} cells are there. {measured_on(cells)}".strip()]
    for task, what in TASKS.items():
        mine = [study for study in all_studies if study.spec.task == task]
        lines = [line for study in mine if (line := _line(study, store)) is not None]
        budget = mine[0].spec.budget
        blocks.append(f"### {task}: {what}")
        blocks.append(_budget(budget))
        blocks.append(markdown(COLUMNS, lines) if lines else "No cell yet.")
    return "\n\n".join(blocks)


COLUMNS = (
    "method", "trained parameters", "seeds", "chosen, of those tried", "dev accuracy", "test accuracy", "test macro-F1",
    "steps x batch", "training seconds",
)  # fmt: skip


def _line(study: Study, store: Store) -> list[str] | None:
    runs = study.runs(store)
    if not runs:
        return None
    first, batch = runs[0].result, study.spec.budget["per_device_train_batch_size"]
    return [
        NAMES[study.spec.method],
        parameters(first),
        f"{len(runs)} of {len(study.seeds)}",
        chosen_of(study, store),
        spread([run.result["dev"]["accuracy"] for run in runs]),
        spread([run.result["test"]["accuracy"] for run in runs]),
        spread([run.result["test"]["macro_f1"] for run in runs]),
        f"{first['steps']} x {batch}" if first["steps"] else f"{first['examples']:,} rows",
        spread([run.result["train_seconds"] for run in runs], 0),
    ]


def _budget(budget: dict[str, Any]) -> str:
    if budget["test_rows"] is not None:
        return "A quick run: these figures mean nothing."
    return (
        f"Budget of every method: {budget['train_rows']:,} training rows, {budget['max_steps']} steps of "
        f"{budget['per_device_train_batch_size']} rows, at most {budget['max_length']} tokens a row; "
        f"{budget['dev_rows']:,} other rows choose the setting; scored on the whole test set."
    )


BENCHMARK = Benchmark("classification", __doc__.splitlines()[0] if __doc__ else "", studies, run, render)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
