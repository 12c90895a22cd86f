"""The cells of a comparison: which are done already, and running those that are not."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltatune.compare import cell
from deltatune.compare.leg import Leg, legs_of, run_leg
from deltatune.compare.plan import Candidate, Plan
from deltatune.data.prepare import Corpus
from deltatune.errors import TrainError
from deltatune.train.settings import TrainSettings

VERSION = 1  # of what a cell measures: raised where old results would not be comparable
CELLS = "cells"
LOG = "cell.log"
_NOT_MEASURED = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "num_threads", "allow_change"}


def specs(plan: Plan, corpus: Corpus, forget: Corpus | None) -> dict[tuple[str, int], cell.Spec]:
    """What each cell is to be told, by candidate and seed.

    Args:
        corpus: The rows, whose contents are part of each cell's key.
        forget: Those of `forget_file`.
    """
    parts = [corpus.train, corpus.eval, corpus.test, forget.train if forget is not None else None]
    digests = [None if part is None else part.digest for part in parts]
    made = {}
    for candidate in plan.candidates:
        for seed in plan.seeds:
            folder = folder_of(plan, candidate, seed)
            settings = candidate.settings.model_copy(
                update={"seed": seed, "output_dir": str(folder), "overwrite_output_dir": True}
            )
            made[candidate.name, seed] = _spec(settings, plan, digests)
    return made


def _spec(settings: TrainSettings, plan: Plan, digests: list[str | None]) -> cell.Spec:
    measured = {name: value for name, value in settings.resolved().items() if name not in _NOT_MEASURED}
    facts = [VERSION, measured, digests, plan.metric, plan.own.forget_file is not None]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cell.Spec(settings.model_dump(mode="json"), plan.metric, plan.own.forget_file, key)


def folder_of(plan: Plan, candidate: Candidate, seed: int) -> Path:
    plain = re.sub(r"[^\w.=-]+", "_", candidate.name)
    if plain != candidate.name:  # two names must not become one folder
        plain += f"-{hashlib.sha256(candidate.name.encode()).hexdigest()[:6]}"
    return plan.output / CELLS / plain / f"seed-{seed}"


def done(spec: cell.Spec) -> cell.Result | None:
    """What an earlier comparison found, unless it failed: the machine may have more memory now."""
    found = cell.read(Path(spec.settings["output_dir"]), spec.key)
    return None if found is None or found.failed is not None else found


def run(specs: list[cell.Spec], isolate: bool) -> list[cell.Result]:
    """Run the cells of one candidate one after the other, in a process of their own or here.

    Raises:
        TrainError: The process ended without their results.
    """
    if not isolate:
        return [cell.run_cell(spec) for spec in specs]
    folders = [Path(spec.settings["output_dir"]) for spec in specs]
    in_process("deltatune.compare.cell", [asdict(spec) for spec in specs], folders)
    return [read(spec, folder) for spec, folder in zip(specs, folders)]


def leg(spec: cell.Spec, share: float, isolate: bool) -> Leg | None:
    """Where a cell stands after a share of its steps; None where it failed, which its result says."""
    folder = Path(spec.settings["output_dir"])
    found = legs_of(folder, spec.key).get(f"{share:g}")
    if found is not None or not isolate:
        return found or run_leg(spec, share)
    in_process("deltatune.compare.leg", {"spec": asdict(spec), "share": share}, [folder])
    return legs_of(folder, spec.key).get(f"{share:g}")


def run_together(specs: list[cell.Spec], isolate: bool, must_gain: bool) -> str | None:
    """Run the cells of several candidates under one seed in one pass; the reason where they have to run alone."""
    if not isolate:
        from deltatune.compare.one_pass import run_together as here

        return here(specs, must_gain)
    folders = [Path(spec.settings["output_dir"]) for spec in specs]
    answer = folders[0] / "one-pass.json"
    told = {"specs": [asdict(spec) for spec in specs], "must_gain": must_gain, "answer": str(answer)}
    in_process("deltatune.compare.one_pass", told, folders)
    return json.loads(answer.read_text(encoding="utf-8"))


def read(spec: cell.Spec, folder: Path) -> cell.Result:
    """What a process has left."""
    found = cell.read(folder, spec.key)
    if found is None:
        raise TrainError(f"a cell has left no result in {folder}; see {folder / LOG}", path=str(folder))
    return found


def in_process(module: str, told: Any, folders: list[Path]) -> None:
    """Run a module on a file of what it is told; what it prints goes to a log."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / cell.RESULT).unlink(missing_ok=True)
    file, log = folders[0] / "cell-spec.json", folders[0] / LOG
    file.write_text(json.dumps(told), encoding="utf-8")
    with log.open("w", encoding="utf-8") as out:
        ended = subprocess.run([sys.executable, "-m", module, str(file)], stdout=out, stderr=out, check=False)
    if ended.returncode in (-2, 130, 143):
        raise KeyboardInterrupt
    if ended.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no message"]
        raise TrainError(f"a cell ended with code {ended.returncode}: {lines[-1]}; see {log}", path=str(log))
