"""Every prompt method beside full fine-tuning and LoRA: classification, tagging, questions about a text, generation.

    python benchmarks/prompt_methods.py                what is missing, most telling first, at most two hours
    python benchmarks/prompt_methods.py --list         what is there
    python benchmarks/prompt_methods.py --only wnut17  one task, or wnut17/prefix one study

Every run is a cell in benchmarks/cells; the tables in docs/results.md are made from them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import e2e_nlg
from harness import minilm
from harness.cells import Cell, Spec, Store
from harness.command import Benchmark, main
from harness.data import HASHES
from harness.progress import Line
from harness.sentences import parts_of, start_text
from harness.studies import Study
from harness.tables import markdown, measured_on, parameters, spread

SCHEDULE = {"lr_scheduler_type": "linear", "warmup_ratio": 0.06, "weight_decay": 0.0, "max_grad_norm": 1.0}
SEEDS = (0, 1, 2)
RECIPE = 1  # raise it when a change of code changes what a cell computes: all cells are run again
EVAL_BATCH = 64  # changes no figure beyond rounding, so it is not part of a cell
GOAL = 0.97  # of full fine-tuning's mean, by the mean of P-tuning v2

# Four learning rates for each method, the likeliest first; one grid for all prompt methods.
PROMPT = (3e-2, 1e-2, 1e-1, 3e-3)
LORA, FULL = (3e-3, 1e-3, 1e-2, 3e-4), (1e-4, 3e-4, 3e-5, 1e-3)
LORA_T5, FULL_T5 = (3e-3, 1e-2, 1e-3, 3e-2), (1e-3, 3e-4, 3e-3, 1e-4)

VIRTUAL = {"num_virtual_tokens": 20}
PREFIX = {"method": "prefix_tuning", **VIRTUAL}


@dataclass(frozen=True)
class Task:
    """What is learnt, with how much work, and which scores are shown.

    Attributes:
        kind: The task of `TrainSettings`.
        scores: (name in the result, digits) of what is shown of the test rows; the first is compared with full
            fine-tuning's.
        chooses: The dev score that chooses.
        floor: Options and grid of the floor.
        both: What the multitask prompt trains beside the task; empty where there is no such study.
    """

    what: str
    kind: str
    data: tuple[str, ...]
    budget: dict[str, Any]
    quick: dict[str, Any]
    scores: tuple[tuple[str, int], ...]
    chooses: str
    floor: tuple[dict[str, Any], tuple[float, ...], str]
    both: str = ""


SENTENCES = {"max_steps": 200, "per_device_train_batch_size": 16, "max_length": 64, "group_by_length": True}
PASSAGES = {"max_steps": 300, "per_device_train_batch_size": 8, "max_length": 256, "max_target_length": 30}
TASKS = {
    "sentence_polarity": Task(
        "movie-review sentences, 2 classes",
        "classification",
        ("sentence_polarity/train", "sentence_polarity/test"),
        {"train_rows": 6400, "dev_rows": 1000, "test_rows": None, **SENTENCES},
        {"train_rows": 160, "dev_rows": 40, "test_rows": 40, "max_steps": 6},
        (("accuracy", 3), ("macro_f1", 3)),
        "accuracy",
        ({}, (0.01, 0.1, 1.0, 0.001), "C"),
        both="banking77, in one classifier of 79 classes",
    ),
    "wnut17": Task(
        "named entities of six kinds in social media",
        "token_classification",
        ("wnut17/train", "wnut17/dev", "wnut17/test"),
        {"train_rows": None, "dev_rows": None, "test_rows": None, **SENTENCES},
        {"train_rows": 160, "dev_rows": 40, "test_rows": 40, "max_steps": 6},
        (("f1", 3), ("precision", 3), ("recall", 3), ("accuracy", 3)),
        "f1",
        ({}, (1e-2, 3e-2, 3e-3, 1e-1), "learning_rate"),
    ),
    "squad_newwiki": Task(
        "the answer to a question as a span of a paragraph, other articles in each part",
        "question_answering",
        ("squad_newwiki/all",),
        {"train_rows": 800, "dev_rows": 200, "test_rows": 400, **PASSAGES},
        {"train_rows": 40, "dev_rows": 8, "test_rows": 8, "max_steps": 4},
        (("f1", 3), ("exact_match", 3)),
        "f1",
        ({}, (1e-2, 3e-2, 3e-3, 1e-1), "learning_rate"),
    ),
    "e2e": Task(
        "restaurant records to text",
        "seq2seq",
        ("e2e/train", "e2e/dev", "e2e/test"),
        {**e2e_nlg.BUDGET, "dev_rows": 300, "test_records": 200, "max_steps": 300},
        {"train_rows": 96, "dev_rows": 16, "test_records": 8, "max_steps": 6},
        (("bleu", 1), ("bleu_swapped", 1), ("rouge_l", 1), ("slots", 3), ("slots_swapped", 3)),
        "loss",
        ({}, (), "learning_rate"),
        both="the way back, from text to record",
    ),
}
NAMES = {
    "prefix": "P-tuning v2 (prefix in every layer), random start",
    "full": "full fine-tuning",
    "prefix_text": "P-tuning v2, start from text",
    "lora": "LoRA r=8",
    "floor": "floor: the base is frozen, only the head is trained",
    "prefix_scaled": "P-tuning v2, random start of the size of real keys and values",
    "prompt": "prompt tuning, random start",
    "prompt_text": "prompt tuning, start from text",
    "p_tuning": "P-tuning (MLP)",
    "multitask": "multitask prompt tuning",
}


def methods(task: Task) -> dict[str, tuple[dict[str, Any], tuple[float, ...]]]:
    """Options and grid of each method, the most telling first."""
    generates = task.kind == "seq2seq"
    prefix = {**PREFIX, **({"sites": "all"} if generates else {})}
    lora = {"method": "lora", "r": 8, "lora_alpha": 16}
    lora["target_modules"] = "all-linear" if generates else ["query", "value"]
    made = {
        "prefix": (prefix, PROMPT),
        "full": ({"method": "full"}, FULL_T5 if generates else FULL),
        "prefix_text": ({**prefix, "start": "text"}, PROMPT),
        "lora": (lora, LORA_T5 if generates else LORA),
        "floor": task.floor[:2],
        "prompt": ({"method": "prompt_tuning", **VIRTUAL}, PROMPT),
        "p_tuning": ({"method": "p_tuning", **VIRTUAL}, PROMPT),
    }
    if task.both:  # the two tasks that also ask what other starts do, for want of hours
        made["prefix_scaled"] = ({**prefix, "init_weights": "scaled"}, PROMPT)
        made["prompt_text"] = ({"method": "prompt_tuning", **VIRTUAL, "start": "text"}, PROMPT)
        made["multitask"] = ({"method": "multitask_prompt_tuning", **VIRTUAL, "num_tasks": 2}, PROMPT)
    return made


def studies(quick: bool = False) -> list[Study]:
    made = []
    for name, task in TASKS.items():
        budget = {**task.budget, **(task.quick if quick else {})}
        base = e2e_nlg.base_hash() if task.kind == "seq2seq" else minilm.SHA256
        for method, (options, grid) in methods(task).items():
            data = (
                *task.data,
                *(("banking77/train",) if method == "multitask" and name == "sentence_polarity" else ()),
            )
            inputs = {"recipe": RECIPE, "base": base, **{part: HASHES[part] for part in data}}
            trains = "method" in options
            untouched = method == "floor" and not grid  # nothing is trained: only what is scored counts
            kept = ("test_records", "max_length", "max_target_length")
            made.append(
                Study(
                    Spec(
                        "prompt_methods", name, method, SEEDS[0],
                        {key: budget[key] for key in kept} if untouched else budget,
                        {**options, **SCHEDULE} if trains else options,
                        inputs,
                    ),
                    knob=task.floor[2] if method == "floor" else "learning_rate",
                    grid=grid[:1] if quick else grid,
                    seeds=SEEDS[:1] if quick or method == "floor" else SEEDS,
                    score=task.chooses,
                    lower_is_better=task.chooses == "loss",
                )
            )  # fmt: skip
    return made


def run(spec: Spec, work: Path, line: Line) -> dict[str, Any]:
    """The result of one cell."""
    if TASKS[spec.task].kind == "seq2seq":
        from harness.records import run_records

        return run_records(spec, work, line)
    return _sentences(spec, work, line)


def _sentences(spec: Spec, work: Path, line: Line) -> dict[str, Any]:
    from harness.training import facts, in_folder, settings_of, start_options, train_cell

    folder, task, multitask = minilm.minilm_folder(), TASKS[spec.task], spec.method == "multitask"
    parts = parts_of(spec.task, spec.budget, both=multitask)
    if spec.method == "floor":
        return _floor(spec, folder, parts, line)
    settings = {
        "model_name_or_path": str(folder), "task": task.kind, "per_device_eval_batch_size": EVAL_BATCH,
        **settings_of(spec), **start_options(spec, lambda: start_text(parts["train"]), str(folder)),
        **({"task_column": "task"} if multitask else {}),
    }  # fmt: skip
    result = in_folder(
        work, lambda place: train_cell(settings, place, line, parts["train"], parts["dev"], parts["test"])
    )
    after = result.metrics["after"]
    return {
        "dev": after["eval"],
        "test": after["test"],
        **facts(result, len(parts["train"]), spec.budget["per_device_train_batch_size"]),
    }


def _floor(spec: Spec, folder: Path, parts: dict[str, Any], line: Line) -> dict[str, Any]:
    budget, kind = spec.budget, TASKS[spec.task].kind
    if kind == "classification":
        from harness.probe import probe

        return probe(folder, parts, spec.hyper["C"], budget["max_length"], EVAL_BATCH, line.tell)
    from harness.frozen import Frozen, frozen_head

    return frozen_head(Frozen(folder, kind, budget, line.tell), parts, spec.hyper["learning_rate"], spec.seed)


# ------------------------------------------------------------------------------------------------------------- tables


def render(all_studies: Sequence[Study], store: Store) -> str:
    """Markdown of everything that is in the store."""
    done, size = sum(study.finished(store) for study in all_studies), sum(study.size for study in all_studies)
    cells = [cell for study in all_studies for cell in study.cells(store)]
    blocks = [f"{done} of {size} cells are there. {measured_on(cells)}".strip()]
    for name, task in TASKS.items():
        mine = [study for study in all_studies if study.spec.task == name]
        runs = {study.spec.method: study.runs(store) for study in mine}
        lines = [_line(task, study, runs, store) for study in mine if runs[study.spec.method]]
        blocks.append(f"### {name}: {task.what}")
        blocks.append(_budget(next(study.spec.budget for study in mine if study.grid)))
        if task.both and runs.get("multitask"):
            blocks.append(f"Multitask: the prompt is shared with {task.both}; every second row is one of those.")
        blocks.append(markdown(_columns(task), lines) if lines else "No cell yet.")
        blocks += _goal(task, runs)
    return "\n\n".join(blocks)


def _columns(task: Task) -> list[str]:
    tests = [f"test {name.replace('_', ' ')}" for name, _ in task.scores]
    return [
        "method", "trained parameters", "seeds", f"dev {task.chooses} of each value tried (first seed)",
        *tests, "of full", "steps x batch", "training seconds",
    ]  # fmt: skip


def _line(task: Task, study: Study, runs: dict[str, list[Cell]], store: Store) -> list[str]:
    mine = runs[study.spec.method]
    first, batch = mine[0].result, study.spec.budget.get("per_device_train_batch_size")
    tests = [spread([run.result["test"][score] for run in mine], digits) for score, digits in task.scores]
    floor = study.spec.method == "floor"
    return [
        "the untouched base" if floor and not study.grid else NAMES[study.spec.method],
        parameters(first) if "trainable_parameters" in first else "",
        f"{len(mine)} of {len(study.seeds)}",
        _sweep(study, store) if study.grid else "",
        *tests,
        "" if (share := _share(task, mine, runs)) is None else f"{share:.3f}",
        f"{first['steps']} x {batch}" if first.get("steps") else "",
        spread([run.result["train_seconds"] for run in mine], 0) if "train_seconds" in first else "",
    ]  # fmt: skip


def _sweep(study: Study, store: Store) -> str:
    """`**0.1: 0.812**, 0.03: 0.777`: the whole search, its choice in bold; what is not tried yet is a dash."""
    chosen, found = study.chosen(store), []
    for spec in sorted(study.tries(), key=lambda spec: spec.hyper[study.knob]):
        cell = store.get(spec)
        shown = f"{spec.hyper[study.knob]:g}: " + ("-" if cell is None else f"{cell.result['dev'][study.score]:.3f}")
        found.append(f"**{shown}**" if chosen is not None and chosen.spec == spec else shown)
    return ", ".join(found)


def _share(task: Task, mine: list[Cell], runs: dict[str, list[Cell]]) -> float | None:
    """Mean of the first test score, as a share of full fine-tuning's."""
    if not runs.get("full"):
        return None
    own, full = (statistics.fmean(r.result["test"][task.scores[0][0]] for r in found) for found in (mine, runs["full"]))
    return own / full if full else None


def _goal(task: Task, runs: dict[str, list[Cell]]) -> list[str]:
    """How near P-tuning v2 comes to full fine-tuning, once all seeds of both are there."""
    found = {name: runs[name] for name in runs if name.startswith("prefix") and len(runs[name]) == len(SEEDS)}
    if task.kind != "classification" or not found or len(runs["full"]) < len(SEEDS):
        return []
    shares = {name: _share(task, mine, runs) or 0.0 for name, mine in found.items()}
    best = max(shares, key=lambda name: shares[name])
    verdict = "reached" if shares[best] >= GOAL else "missed"
    return [f"Goal, {GOAL:g} of full fine-tuning's mean accuracy: {verdict} by {NAMES[best]} with {shares[best]:.3f}."]


def _budget(budget: dict[str, Any]) -> str:
    if budget["max_steps"] < 100:
        return "A quick run: these figures mean nothing."
    tested = budget.get("test_rows", budget.get("test_records"))
    return (
        f"Budget of every method: {budget['max_steps']:,} steps of {budget['per_device_train_batch_size']} rows from "
        f"{_count(budget['train_rows'])} training rows, at most {budget['max_length']} tokens a row; "
        f"{_count(budget['dev_rows'])} other rows choose the learning rate; scored on {_count(tested)} of the test set."
    )


def _count(number: int | None) -> str:
    return "all" if number is None else f"{number:,}"


BENCHMARK = Benchmark("prompt_methods", __doc__.splitlines()[0] if __doc__ else "", studies, run, render)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
