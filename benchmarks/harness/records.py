"""E2E cells of prompt_methods: records to text as in e2e_nlg, with starts from text and a prompt of two tasks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import e2e_nlg

from harness.cells import Spec
from harness.data import Row, rows, spread_over
from harness.meanings import group, linearised
from harness.progress import Line
from harness.sentences import TEXT_ROWS
from harness.training import facts, in_folder, settings_of, start_options, train_cell


def run_records(spec: Spec, work: Path, line: Line) -> dict[str, Any]:
    """Train on rows drawn by the seed, choose by dev loss, tell every test record."""
    from deltatune.demo.base import FOLDER

    test = spread_over(group(rows("e2e/test")), spec.budget["test_records"])
    if spec.method == "floor":
        from deltatune.demo.base import load_base

        model, tokenizer = load_base()
        return e2e_nlg.scored(spec, model, tokenizer, test, line)
    drawn = random.Random(f"rows of seed {spec.seed}").sample(rows("e2e/train"), spec.budget["train_rows"])
    multitask = spec.method == "multitask"
    train = both_ways(drawn) if multitask else e2e_nlg.pairs(drawn)
    dev = e2e_nlg.pairs(spread_over(rows("e2e/dev"), spec.budget["dev_rows"]))
    settings = {
        "model_name_or_path": e2e_nlg.DEMO, "task": "seq2seq", "per_device_eval_batch_size": e2e_nlg.EVAL_BATCH,
        **settings_of(spec), **start_options(spec, lambda: start_text(train), str(FOLDER)),
        **({"task_column": "task"} if multitask else {}),
    }  # fmt: skip

    def train_and_score(place: Path) -> dict[str, Any]:
        result = train_cell(settings, place, line, train, [{**row, "task": 0} for row in dev] if multitask else dev)
        ids = [0] * len(test) if multitask else None
        return {
            "dev": {"loss": result.metrics["after"]["eval"]["loss"]},
            **facts(result, len(train), spec.budget["per_device_train_batch_size"]),
            **e2e_nlg.scored(spec, result.model, result.tokenizer, test, line, ids),
        }

    return in_folder(work, train_and_score)


def both_ways(drawn: list[Row]) -> list[Row]:
    """Every second row is turned round: its text is the input, its record the target."""
    return [
        {"input": row["ref"], "target": linearised(row["mr"]), "task": 1}
        if place % 2
        else {"input": linearised(row["mr"]), "target": row["ref"], "task": 0}
        for place, row in enumerate(drawn)
    ]


def start_text(train: list[Row]) -> str:
    """Inputs with their targets, one after the other."""
    return " ".join(f"{row['input']} {row['target']}" for row in spread_over(train, TEXT_ROWS))
