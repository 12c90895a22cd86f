"""One cell of a comparison: a candidate trained under one seed, and all that is measured of it.

`python -m deltatune.compare.cell SPECS.json` runs all cells of a candidate in a process of their own, so that the peak
of their memory is their own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.compare.scores import RowScores, score_rows
from deltatune.data.prepare import Corpus, Part
from deltatune.errors import PeftError
from deltatune.model import PeftModel
from deltatune.train import TrainResult, TrainSettings, train
from deltatune.train.base import finish_base, load_base
from deltatune.train.corpus import encode_corpus, load_corpus
from deltatune.train.defaults import FULL
from deltatune.train.events import Listener
from deltatune.train.judge import Judge
from deltatune.train.processes import meet
from deltatune.train.result import as_json

RESULT = "cell.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "model*.safetensors")


@dataclass(frozen=True)
class Spec:
    """What a cell is told: `key` names all that its numbers depend on."""

    settings: dict[str, Any]
    metric: str
    forget_file: str | None
    key: str

    @property
    def run(self) -> TrainSettings:
        return TrainSettings(**self.settings)


@dataclass(frozen=True)
class Result:
    """What is known of a cell. `failed` says why there is nothing else."""

    key: str
    rows: RowScores | None = None
    loss: float | None = None  # over the held-out rows
    forgetting: float | None = None  # loss on other rows, over that of the base
    trainable_parameters: int = 0
    total_parameters: int = 0
    adapter_bytes: int = 0
    peak_memory_bytes: int = 0
    train_seconds: float = 0.0
    steps: int = 0
    together: int = 1  # candidates that trained in the same passes
    failed: str | None = None


def run_cell(spec: Spec, listener: Listener | None = None) -> Result:
    """Train and score; the adapter and the files of its run are left in the folder of the settings.

    A run whose first part was trained already goes on from there.
    """
    from deltatune.compare import leg

    settings = spec.run.model_copy(update=leg.changes_to_go_on(spec))
    try:
        done = train(settings, callbacks=[listener] if listener is not None else [])
        result = measure(spec, done)
        leg.clear(Path(spec.settings["output_dir"]))
    except PeftError as error:
        result = Result(spec.key, failed=f"{type(error).__name__}: {error}")
    write(result, Path(spec.settings["output_dir"]))
    return result


def measure(spec: Spec, done: TrainResult) -> Result:
    """A run that has ended, as numbers."""
    settings, device = done.settings, next(done.model.parameters()).device
    metrics = done.metrics
    rows = held_out_scores(spec, settings, done.model, done.tokenizer)
    held = metrics["after"].get("test") or metrics["after"]["eval"]
    return Result(
        key=spec.key,
        rows=rows,
        loss=held["loss"],
        forgetting=forgetting(spec, settings, done.model, done.tokenizer, device),
        trainable_parameters=metrics["trainable_parameters"],
        total_parameters=metrics["total_parameters"],
        adapter_bytes=stored_bytes(done.output_dir),
        peak_memory_bytes=metrics["peak_memory_bytes"],
        train_seconds=metrics["train_seconds"],
        steps=metrics["steps"],
    )


def held_out_scores(spec: Spec, settings: TrainSettings, model: nn.Module, tokenizer: Any) -> RowScores:
    corpus = _encoded(settings, load_corpus(settings), model, tokenizer)
    return score_rows(judge_of(settings, corpus, tokenizer), model, held_out(corpus), spec.metric)


def held_out(corpus: Corpus) -> Part:
    """The rows that candidates are compared on: those to test on, else those to evaluate on."""
    part = corpus.test or corpus.eval
    assert part is not None  # the plan sees to it
    return part


def forgetting(
    spec: Spec, settings: TrainSettings, model: nn.Module, tokenizer: Any, device: torch.device
) -> float | None:
    """How much higher the loss on other rows is than the base's; None where no such rows were given."""
    if spec.forget_file is None:
        return None
    other = forget_settings(settings, spec.forget_file)
    corpus = _encoded(other, load_corpus(other), model, tokenizer)
    judge = judge_of(other, corpus, tokenizer)
    after = judge.loss(model, corpus.train)["loss"]
    if settings.method == FULL:
        base = load_base(settings, corpus.labels, device).model.to(device)
        return after - judge.loss(base, corpus.train)["loss"]
    with model.disable_adapter():  # type: ignore[operator]
        return after - replace(judge, corpus=corpus.without_task_ids()).loss(model, corpus.train)["loss"]


def forget_settings(settings: TrainSettings, file: str) -> TrainSettings:
    """The same model on other rows, of which every one is read."""
    nothing = {"eval_file": None, "test_file": None, "eval_split": 0.0, "dataset": None, "data_weights": []}
    columns = dict.fromkeys(("input_column", "target_column", "text_column", "task_column", "max_train_samples"))
    return settings.model_copy(update={**nothing, **columns, "column_mapping": {}, "train_file": file})


def stored_bytes(folder: Path) -> int:
    """The size of the adapter's file, or of the model's."""
    for pattern in WEIGHTS:
        if found := [path.stat().st_size for path in folder.glob(pattern)]:
            return sum(found)
    return 0


def write(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_bytes(as_json(asdict(result)))


def read(folder: Path, key: str) -> Result | None:
    """What was found of this cell; None where nothing was, or of another one in its place."""
    try:
        told = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        rows = told.pop("rows")
        result = Result(**told, rows=None if rows is None else RowScores(**rows))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return result if result.key == key else None


def _encoded(settings: TrainSettings, corpus: Corpus, model: nn.Module, tokenizer: Any) -> Corpus:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    words = finish_base(base, tokenizer, settings)
    return encode_corpus(settings, corpus, tokenizer, words.vocabulary, words.positions)


def judge_of(settings: TrainSettings, corpus: Corpus, tokenizer: Any) -> Judge:
    return Judge(settings, corpus, tokenizer, meet(settings.device), Listener())


if __name__ == "__main__":
    from deltatune.cli.show import quiet_libraries, warnings_as_lines

    warnings_as_lines()
    quiet_libraries()
    for told in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run_cell(Spec(**told))
