"""E2E NLG, real restaurant records to text: prefix tuning, LoRA and full fine-tuning of the embedded T5.

    python benchmarks/e2e_nlg.py              what is missing, most telling first, at most two hours
    python benchmarks/e2e_nlg.py --list       what is there
    python benchmarks/e2e_nlg.py --only lora

Every run is a cell in benchmarks/cells; the tables in docs/results.md are made from them.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from harness.cells import Cell, Spec, Store
from harness.command import Benchmark, main
from harness.data import HASHES, Row, rows, spread_over
from harness.meanings import Meaning, fixed_text, group, human_score, linearised, score
from harness.progress import Line
from harness.studies import Study
from harness.tables import chosen_of, markdown, measured_on, parameters, spread

from deltatune.errors import FormatError

STEPS = {"max_steps": 1000, "per_device_train_batch_size": 16, "max_length": 128, "max_target_length": 96}
BUDGET = {
    "train_rows": 16_000,
    "dev_rows": 1000,
    "test_records": None,
    "group_by_length": True,
    **STEPS,
}
QUICK = {**BUDGET, "train_rows": 320, "dev_rows": 32, "test_records": 16, "max_steps": 20}
SCHEDULE = {"lr_scheduler_type": "linear", "warmup_ratio": 0.06, "weight_decay": 0.0, "max_grad_norm": 1.0}

# method -> (its options, its grid, the likeliest value first). Three values for each: a factor of about three apart.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "fixed": ({"candidates": 100}, ()),
    "base": ({}, ()),
    "prefix": ({"method": "prefix_tuning", "num_virtual_tokens": 20, "sites": "all"}, (1e-1, 3e-2, 3e-1)),
    "lora": ({"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, (3e-3, 1e-3, 1e-2)),
    "full": ({"method": "full"}, (1e-3, 3e-4, 3e-3)),
    "human": ({}, ()),
}
NAMES = {
    "fixed": "one fixed text for every record",
    "base": "the untouched base",
    "prefix": "prefix tuning, 20 virtual tokens in every attention",
    "lora": "LoRA r=8 on all linear layers",
    "full": "full fine-tuning",
    "human": "a person: the first reference against the others",
}
WITHOUT_MODEL = ("fixed", "human")
SEEDS = (0, 1, 2)
RECIPE = 1  # raise it when a change of code changes what a cell computes: all cells are run again
EVAL_BATCH = 64  # changes no figure beyond rounding, so it is not part of a cell
SHOWN = 4  # outputs kept in a cell
DEMO = "demo"


@cache
def base_hash() -> str:
    """Identifies the weights of the embedded T5, so that another pretraining means other cells."""
    try:
        from deltatune.demo.base import load_base
    except ImportError as error:
        raise FormatError("this copy of deltatune has no embedded base model; reinstall deltatune") from error
    from deltatune.storage.fingerprint import fingerprint

    return fingerprint(load_base()[0])["values"]


def studies(quick: bool = False) -> list[Study]:
    made = []
    for method, (options, grid) in METHODS.items():
        hashes = {part: HASHES[f"e2e/{part}"] for part in ("train", "dev", "test")}
        reads_model = method not in WITHOUT_MODEL
        inputs = {"recipe": RECIPE, **hashes, **({"base": base_hash()} if reads_model else {})}
        budget = QUICK if quick else BUDGET
        if not grid:  # nothing is trained: only what is scored counts, and nothing in it is random
            budget = {name: budget[name] for name in ("test_records", "max_length", "max_target_length")}
        hyper = {"model_name_or_path": DEMO, **options, **(SCHEDULE if grid else {})}
        made.append(
            Study(
                Spec("e2e_nlg", "e2e", method, SEEDS[0], budget, hyper if reads_model else options, inputs),
                grid=grid[:1] if quick else grid,
                seeds=SEEDS if grid and not quick else SEEDS[:1],
                score="loss",
                lower_is_better=True,
            )
        )
    return made


def run(spec: Spec, work: Path, line: Line) -> dict[str, Any]:
    """The result of one cell."""
    test = spread_over(group(rows("e2e/test")), spec.budget["test_records"] or sys.maxsize)
    if spec.method == "human":
        return {"test": human_score(test), "samples": [(m.record, m.references[0]) for m in _shown(test)]}
    if spec.method == "fixed":
        many = spec.hyper["candidates"]
        candidates = [row["ref"] for row in spread_over(rows("e2e/train"), many)]
        text = fixed_text(candidates, spread_over(group(rows("e2e/dev")), many))
        return {"test": score([text] * len(test), test), "samples": [(m.record, text) for m in _shown(test)]}
    if spec.method == "base":
        from deltatune.train import TrainSettings
        from deltatune.train.base import load_base

        base = load_base(TrainSettings(model_name_or_path=spec.hyper["model_name_or_path"], task="seq2seq"))
        return scored(spec, base.model, base.tokenizer, test, line)
    return _trained(spec, work, line, test)


def _trained(spec: Spec, work: Path, line: Line, test: list[Meaning]) -> dict[str, Any]:
    from harness.training import facts, in_folder, settings_of, train_cell

    drawn = random.Random(f"rows of seed {spec.seed}").sample(rows("e2e/train"), spec.budget["train_rows"])
    train_rows, dev_rows = pairs(drawn), pairs(spread_over(rows("e2e/dev"), spec.budget["dev_rows"]))
    settings = {"task": "seq2seq", "per_device_eval_batch_size": EVAL_BATCH, **settings_of(spec)}

    def train_and_score(place: Path) -> dict[str, Any]:
        result = train_cell(settings, place, line, train_rows, dev_rows)
        return {
            "dev": {"loss": result.metrics["after"]["eval"]["loss"]},
            **facts(result, len(train_rows), spec.budget["per_device_train_batch_size"]),
            **scored(spec, result.model, result.tokenizer, test, line),
        }

    return in_folder(work, train_and_score)


def pairs(chosen: Sequence[Row]) -> list[Row]:
    return [{"input": linearised(row["mr"]), "target": row["ref"]} for row in chosen]


def scored(
    spec: Spec, model: Any, tokenizer: Any, test: list[Meaning], line: Line, task_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    from deltatune.data.encode import Encoder
    from deltatune.evaluate import answer

    limit = spec.budget["max_target_length"]
    encoder = Encoder(tokenizer, "seq2seq", spec.budget["max_length"], limit)
    prompts = [encoder.prompt(linearised(meaning.record)) for meaning in test]
    line.on_stage("test records", len(test))
    begun = time.perf_counter()
    outputs = answer(
        model, tokenizer, prompts, causal=False, task_ids=task_ids, max_new_tokens=limit, batch_size=EVAL_BATCH,
        after_batch=line.on_stage_progress,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    told = dict(zip((meaning.record for meaning in test), outputs))
    samples = [(meaning.record, told[meaning.record]) for meaning in _shown(test)]
    return {"test": score(outputs, test), "generate_seconds": round(seconds, 1), "samples": samples}


def _shown(test: Sequence[Meaning]) -> list[Meaning]:
    return spread_over(test, SHOWN)


# ------------------------------------------------------------------------------------------------------------- tables

COLUMNS = (
    "method", "trained parameters", "seeds", "chosen learning rate, of those tried", "dev loss", "BLEU", "swapped BLEU",
    "ROUGE-L", "swapped ROUGE-L", "slot values", "swapped slot values", "steps x batch", "training seconds",
)  # fmt: skip


def render(all_studies: Sequence[Study], store: Store) -> str:
    """Markdown of everything that is in the store."""
    done, size = sum(study.finished(store) for study in all_studies), sum(study.size for study in all_studies)
    found = [(study, study.runs(store)) for study in all_studies]
    lines = [_line(study, runs, store) for study, runs in found if runs]
    cells = [cell for study, _ in found for cell in study.cells(store)]
    blocks = [f"{done} of {size} cells are there. {measured_on(cells)}".strip(), _budget(all_studies)]
    blocks.append(markdown(COLUMNS, lines) if lines else "No cell yet.")
    blocks += _samples([(study, runs[0]) for study, runs in found if runs])
    return "\n\n".join(blocks)


def _line(study: Study, runs: list[Cell], store: Store) -> list[str]:
    first, budget = runs[0].result, study.spec.budget
    trains = "steps" in first

    def over_seeds(name: str, digits: int = 1) -> str:
        return spread([run.result["test"][name] for run in runs], digits)

    return [
        NAMES[study.spec.method],
        parameters(first) if trains else "",
        f"{len(runs)} of {len(study.seeds)}",
        chosen_of(study, store) if trains else "",
        spread([run.result["dev"]["loss"] for run in runs]) if trains else "",
        over_seeds("bleu"),
        over_seeds("bleu_swapped"),
        over_seeds("rouge_l"),
        over_seeds("rouge_l_swapped"),
        over_seeds("slots", 3),
        over_seeds("slots_swapped", 3),
        f"{first['steps']} x {budget['per_device_train_batch_size']}" if trains else "",
        spread([run.result["train_seconds"] for run in runs], 0) if trains else "",
    ]


def _budget(all_studies: Sequence[Study]) -> str:
    budget = next(study.spec.budget for study in all_studies if study.grid)
    if budget["test_records"] is not None:
        return "A quick run: these figures mean nothing."
    return (
        f"Budget of every method: {budget['max_steps']:,} steps of {budget['per_device_train_batch_size']} rows, "
        f"{budget['train_rows']:,} training rows drawn anew for each seed; {budget['dev_rows']:,} dev rows "
        f"choose the learning rate by their loss; greedy search on every test record, "
        f"at most {budget['max_target_length']} tokens."
    )


def _samples(found: list[tuple[Study, Cell]]) -> list[str]:
    """The same records as every method tells them, first seed."""
    blocks = []
    for place in range(2 if found else 0):
        record = found[0][1].result["samples"][place][0]
        told = [f"- {NAMES[study.spec.method]}: {cell.result['samples'][place][1]}" for study, cell in found]
        blocks.append("\n".join([f"`{record}`", "", *told]))
    return blocks


BENCHMARK = Benchmark("e2e_nlg", __doc__.splitlines()[0] if __doc__ else "", studies, run, render)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
