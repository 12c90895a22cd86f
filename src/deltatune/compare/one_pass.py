"""The cells of one seed in one pass: whether it can be, the training, and each candidate's result and files.

`python -m deltatune.compare.one_pass SPECS.json` does it in a process of its own. Cells that it leaves without a result
run alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from deltatune.compare.cell import Result, Spec, forgetting, held_out, judge_of, stored_bytes, write
from deltatune.compare.scores import score_rows
from deltatune.compare.together import Member, Together
from deltatune.compare.trial import why_not
from deltatune.data.prepare import Corpus
from deltatune.errors import PeftError
from deltatune.memory import ran_out
from deltatune.train import TrainSettings, randomness
from deltatune.train.base import Base, check_device, load_base
from deltatune.train.chunks import choose_loss
from deltatune.train.claim import threads
from deltatune.train.corpus import encode_corpus, load_corpus
from deltatune.train.events import Listener
from deltatune.train.memory import MemoryMeter
from deltatune.train.processes import meet
from deltatune.train.result import SETTINGS, as_json


def run_together(specs: Sequence[Spec], must_gain: bool) -> str | None:
    """Train and score all cells; why nothing was done where they have to run alone.

    Args:
        must_gain: Only where it is faster than one run after the other.
    """
    settings = [spec.run for spec in specs]
    with threads(settings[0], None):
        try:
            base, corpus, device = load(settings[0])
            run = Together(base.model, corpus, settings, device)
            reason = why_not(run, must_gain)
            if reason is not None:
                return reason
            memory = MemoryMeter(device)
            run.train(after_step=memory.measure)
        except PeftError as error:
            return str(error)  # alone, each says it of itself
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            return "there is not enough memory for the rows of all candidates at once"
        for place, (spec, member) in enumerate(zip(specs, run.members)):
            write(_result(spec, run, place, member, base, memory.peak), Path(spec.settings["output_dir"]))
    return None


def load(settings: TrainSettings) -> tuple[Base, Corpus, torch.device]:
    """Base and rows, drawn and seeded as `train` does it."""
    check_device(settings.device)
    device = meet(settings.device).device
    corpus = load_corpus(settings)
    randomness.seed_all(settings.seed)  # a new head is drawn while the base is loaded
    base = load_base(settings, corpus.labels, device)
    corpus = encode_corpus(settings, corpus, base.tokenizer, base.vocabulary, base.positions)
    base.model.to(device)
    choose_loss(base, settings, Listener())
    return base, corpus, device


def _result(spec: Spec, run: Together, place: int, member: Member, base: Base, peak: int) -> Result:
    if member.failed is not None:
        return Result(spec.key, failed=f"TrainError: {member.failed}")
    settings, folder = member.settings, Path(spec.settings["output_dir"])
    run.model.set_adapter(member.name)
    judge = judge_of(settings, run.corpus, base.tokenizer)
    part = held_out(run.corpus)
    try:
        loss = judge.loss(run.model, part)["loss"]
        rows = score_rows(judge, run.model, part, spec.metric)
        forgotten = forgetting(spec, settings, run.model, base.tokenizer, run.device)
        _save(run.model, member, folder)
        base.tokenizer.save_pretrained(str(folder))
    except PeftError as error:
        return Result(spec.key, failed=f"{type(error).__name__}: {error}")
    (folder / SETTINGS).write_bytes(as_json(settings.resolved()))
    return Result(
        key=spec.key,
        rows=rows,
        loss=loss,
        forgetting=forgotten,
        trainable_parameters=sum(parameter.numel() for parameter in member.parameters),
        total_parameters=run.counts[place],
        adapter_bytes=stored_bytes(folder),
        peak_memory_bytes=peak,
        train_seconds=round(run.seconds, 3),
        steps=run.step,
        together=len(run.members),
    )


def _save(model: nn.Module, member: Member, folder: Path) -> None:
    """The adapter where a lone run leaves it: in the folder itself."""
    model.save_pretrained(str(folder), selected_adapters=[member.name])  # type: ignore[operator]
    inner = folder / member.name
    for path in inner.iterdir():
        path.replace(folder / path.name)
    shutil.rmtree(inner)


if __name__ == "__main__":
    from deltatune.cli.show import quiet_libraries, warnings_as_lines

    warnings_as_lines()
    quiet_libraries()
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    reason = run_together([Spec(**spec) for spec in told["specs"]], told["must_gain"])
    Path(told["answer"]).write_text(json.dumps(reason), encoding="utf-8")
