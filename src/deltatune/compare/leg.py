"""The first part of a cell's run, up to a share of its steps: how good is the candidate there?

The run leaves a checkpoint, from which the next part or the whole run goes on to the same bits as without a stop.
`python -m deltatune.compare.leg SPEC.json` does it in a process of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltatune.compare.cell import Result, Spec, write
from deltatune.errors import PeftError
from deltatune.train import checkpoint as checkpoints
from deltatune.train import train
from deltatune.train.events import Listener
from deltatune.train.result import Evaluation, as_json

FILE = "legs.json"


@dataclass(frozen=True)
class Leg:
    """Where a run stood after a share of its steps: `loss` is that over the evaluation rows."""

    step: int
    loss: float


class _Reached(Exception):
    """The checkpoint of the place is whole."""


class _Until(Listener):
    """Ends a run at its first evaluation, behind the checkpoint of the same step."""

    def __init__(self) -> None:
        self.leg: Leg | None = None

    def on_evaluate(self, evaluation: Evaluation) -> None:
        self.leg = Leg(evaluation.step, evaluation.scores["loss"])

    def on_checkpoint(self, step: int, folder: Path) -> None:
        if self.leg is not None and self.leg.step == step:
            raise _Reached


def run_leg(spec: Spec, share: float) -> Leg | None:
    """Train up to a share of the steps, from where an earlier leg ended.

    Returns:
        What was found there; None where the run failed, which its result says.
    """
    folder = Path(spec.settings["output_dir"])
    known = legs_of(folder, spec.key)
    if f"{share:g}" in known:
        return known[f"{share:g}"]
    until = _Until()
    changes = {"eval_steps": share, "save_steps": share, **changes_to_go_on(spec)}
    try:
        train(spec.run.model_copy(update=changes), callbacks=[until])
    except _Reached:
        pass
    except PeftError as error:
        write(Result(spec.key, failed=f"{type(error).__name__}: {error}"), folder)
        return None
    assert until.leg is not None  # the last step is evaluated too
    found = {**known, f"{share:g}": until.leg}
    told = {"key": spec.key, "legs": {name: asdict(leg) for name, leg in found.items()}}
    (folder / FILE).write_bytes(as_json(told))
    return until.leg


def legs_of(folder: Path, key: str) -> dict[str, Leg]:
    """The legs of this cell that were run, by share; none where they were another cell's."""
    try:
        told = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if told["key"] != key:
            return {}
        return {str(share): Leg(**leg) for share, leg in told["legs"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def changes_to_go_on(spec: Spec) -> dict[str, Any]:
    """Settings with which a run goes on behind its legs, where it has any and their checkpoint is there."""
    folder = Path(spec.settings["output_dir"])
    begun = legs_of(folder, spec.key) and checkpoints.listed(folder)
    return {"resume_from_checkpoint": True} if begun else {}


def clear(folder: Path) -> None:
    """Without the checkpoints, which nothing goes on from any more."""
    checkpoints.remove_all(folder)


if __name__ == "__main__":
    from deltatune.cli.show import quiet_libraries, warnings_as_lines

    warnings_as_lines()
    quiet_libraries()
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run_leg(Spec(**told["spec"]), told["share"])
