"""`deltatune compare` at work: six methods, three seeds, three real data sets, which differences are more than noise.

    python benchmarks/which_method.py                 what is missing, about two hours of one core
    python benchmarks/which_method.py --only e2e
    python benchmarks/which_method.py --quick         tiny runs, apart from the results
    python benchmarks/which_method.py --render        the tables and pictures of what is kept

First every method is tried at three learning rates with the first seed and few steps, scored on dev rows; then each is
compared at the best of its three, on the test rows. Both are comparisons of the library's own; what is broken off goes
on where it was. What they found is kept in which_method.json, and drawn into docs/results.md and docs/images.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from harness.data import REPOSITORY, Row, rows, split, spread_over
from harness.meanings import linearised
from harness.part import conditions
from harness.tables import markdown, put_between

from deltatune.compare import compare
from deltatune.storage.files import write_files

RESULTS = Path(__file__).with_suffix(".json")
DOCUMENT, IMAGES = REPOSITORY / "docs" / "results.md", REPOSITORY / "docs" / "images"
SEEDS = 3
# method -> (its options, learning rates a factor of about three apart); the same three for every task
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "LoRA": ({"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, (3e-4, 1e-3, 3e-3)),
    "IA3": ({"method": "ia3"}, (1e-2, 3e-2, 1e-1)),
    "bottleneck adapters": ({"method": "bottleneck"}, (1e-3, 3e-3, 1e-2)),
    "prefix tuning": ({"method": "prefix_tuning", "num_virtual_tokens": 20}, (1e-2, 3e-2, 1e-1)),
    "prompt tuning": ({"method": "prompt_tuning", "num_virtual_tokens": 20}, (3e-2, 1e-1, 3e-1)),
    "full fine-tuning": ({"method": "full"}, (1e-4, 3e-4, 1e-3)),
}
SCHEDULE = {"lr_scheduler_type": "linear", "warmup_ratio": 0.06, "weight_decay": 0.0, "max_grad_norm": 1.0}


@dataclass(frozen=True)
class Task:
    """What is learnt, and with how much work; `choice` is the number of steps by which a rate is chosen."""

    what: str
    metric: str
    train: int
    dev: int
    test: int
    steps: int
    choice: int
    settings: dict[str, Any]


_SENTENCES = {"task": "classification", "per_device_train_batch_size": 16, "max_length": 64, "group_by_length": True}
TASKS = {
    "sentence_polarity": Task(
        "movie-review sentences, 2 classes, with all-MiniLM-L6-v2", "accuracy", 6400, 500, 1066, 200, 80, _SENTENCES
    ),
    "banking77": Task(
        "bank customers' questions, 77 classes, with all-MiniLM-L6-v2", "accuracy", 6400, 500, 1540, 200, 80, _SENTENCES
    ),
    "e2e": Task(
        "restaurant records to text, with the embedded T5", "rouge_l", 8000, 200, 300, 200, 80,
        {"task": "seq2seq", "per_device_train_batch_size": 16, "max_length": 128, "max_target_length": 96,
         "group_by_length": True},
    ),
}  # fmt: skip
QUICK = {"train": 64, "dev": 40, "test": 40, "steps": 3, "choice": 2}


def measure(name: str, task: Task, work: Path, base: str) -> dict[str, Any]:
    """Both comparisons of a task; the second's facts with the choices of the first."""
    files = written(name, task, work)
    shared = {
        **task.settings, **SCHEDULE, "model_name_or_path": base, "train_file": str(files["train"]), "device": "cpu",
        "dtype": "float32", "per_device_eval_batch_size": 64, "num_threads": 1,
    }  # fmt: skip
    tried = [_candidate(method, rate) for method, (_, rates) in METHODS.items() for rate in rates]
    choice = compare(
        {**shared, "test_file": str(files["dev"]), "max_steps": task.choice, "output_dir": str(work / "choice")},
        tried, seeds=1, metric=task.metric, one_pass="never", say=_say,
    )  # fmt: skip
    scores = {line.name: line.score.mean for line in choice.summary.lines}
    rates = {
        method: max(rates, key=lambda r: scores.get(_name(method, r), 0)) for method, (_, rates) in METHODS.items()
    }
    found = compare(
        {**shared, "test_file": str(files["test"]), "max_steps": task.steps, "output_dir": str(work / "compared")},
        [{**_candidate(method, rate), "name": method} for method, rate in rates.items()],
        seeds=SEEDS, metric=task.metric, say=_say,
    )  # fmt: skip
    return {
        "choice": {
            method: {f"{r:g}": scores.get(_name(method, r)) for r in tried} for method, (_, tried) in METHODS.items()
        },
        "rates": rates,
        "verdict": found.summary.verdict,
        "table": (found.output / "compare.md").read_text(encoding="utf-8").split("\n\n")[0],
        "scores": {line.name: line.by_seed for line in found.summary.lines},
        "failed": found.summary.failed,
        "budget": [
            task.train,
            task.dev,
            task.test,
            task.steps,
            task.choice,
            task.settings["per_device_train_batch_size"],
        ],
    }


def _name(method: str, rate: float) -> str:
    return f"{method} lr={rate:g}"


def _candidate(method: str, rate: float) -> dict[str, Any]:
    return {"name": _name(method, rate), "learning_rate": rate, **METHODS[method][0]}


def _say(text: str) -> None:
    print(text, flush=True)


def written(name: str, task: Task, work: Path) -> dict[str, Path]:
    """The rows as the files that a user has."""
    work.mkdir(parents=True, exist_ok=True)
    if name == "e2e":
        train, _ = split(rows("e2e/train"), 0, task.train)
        drawn = {"train": train, "dev": spread_over(rows("e2e/dev"), task.dev)}
        drawn["test"] = spread_over(rows("e2e/test"), task.test)
        parts = {part: [_record(row) for row in held] for part, held in drawn.items()}
    else:
        train, dev = split(rows(f"{name}/train"), task.dev, task.train)
        parts = {"train": train, "dev": dev, "test": spread_over(rows(f"{name}/test"), task.test)}
    for part, held in parts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held)
        (work / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return {part: work / f"{part}.jsonl" for part in parts}


def _record(row: Row) -> Row:
    return {"input": linearised(row["mr"]), "target": row["ref"]}


# ------------------------------------------------------------------------------------------------------------- tables


def render(kept: dict[str, Any]) -> str:
    """Markdown of everything that is kept."""
    blocks = []
    for name, task in TASKS.items():
        if name not in kept:
            continue
        found = kept[name]
        train, dev, test, steps, choice, batch = found["budget"]
        under = found["under"]
        blocks += [
            f"### {name}: {task.what}",
            f"{steps} steps of {batch} rows from {train:,}; rates chosen after {choice} steps by {dev:,} dev rows; "
            f"{test:,} test rows. {under['machine']}, load {under['load'][0]} to {under['load'][1]}: the scores do not "
            "hang on it, the times do.",
            found["table"],
            "\n".join(f"- {text}" for text in [*found["verdict"], *map(" failed: ".join, found["failed"].items())]),
            "Learning rates, with the dev score of each:\n\n" + markdown(("method", "rate and score"), _choices(found)),
            f"![{name}: score against parameters and memory](images/which-method-{name}.png)",
        ]
    return "\n\n".join(blocks)


def _choices(found: dict[str, Any]) -> list[list[str]]:
    lines = []
    for method, scores in found["choice"].items():
        told = [
            (f"**{rate}: {score:.3f}**" if float(rate) == found["rates"][method] else f"{rate}: {score:.3f}")
            if score is not None
            else f"{rate}: failed"
            for rate, score in scores.items()
        ]
        lines.append([method, ", ".join(told)])
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TASKS))
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "build" / "which-method", help="where the runs are kept"
    )
    parser.add_argument("--quick", action="store_true", help="tiny runs; nothing is written into the repository")
    parser.add_argument("--render", action="store_true", help="only draw what is kept")
    asked = parser.parse_args(arguments)
    for name, task in TASKS.items():
        if asked.render or (asked.only and name != asked.only):
            continue
        load = os.getloadavg()[0]
        if asked.quick:
            task = Task(**{**task.__dict__, **QUICK})
        work = asked.work.with_name(f"{asked.work.name}-quick") if asked.quick else asked.work
        found = measure(name, task, work / name, _base(name))
        if asked.quick:
            print(found["table"])
            continue
        kept = {**_kept(), name: {**found, "under": conditions(load)}}  # another run may have written meanwhile
        write_files(RESULTS.parent, {RESULTS.name: (json.dumps(kept, indent=1, sort_keys=True) + "\n").encode()})
        shutil.copy(work / name / "compared" / "compare.png", IMAGES / f"which-method-{name}.png")
    if not asked.quick:
        text = put_between(DOCUMENT.read_text(encoding="utf-8"), "which-method", render(_kept()), DOCUMENT.name)
        DOCUMENT.write_text(text, encoding="utf-8")


def _kept() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def _base(name: str) -> str:
    if name == "e2e":
        return "demo"
    from harness.minilm import minilm_folder

    return str(minilm_folder())


if __name__ == "__main__":
    main()
