"""Before anything is loaded: may this run write here, from which checkpoint does it go on, on how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from deltatune.errors import ConfigError, ResumeError
from deltatune.train import checkpoint as checkpoints
from deltatune.train.events import Listener
from deltatune.train.result import METRICS
from deltatune.train.settings import TrainSettings


def claim(output: Path, settings: TrainSettings, listener: Listener) -> Path | None:
    """The checkpoint to go on from; None for a new run, for which the folder must be free of another one's results."""
    asked = settings.resume_from_checkpoint
    if isinstance(asked, str):
        if not Path(asked).is_dir():
            raise ResumeError(
                f"resume_from_checkpoint={asked!r} is no folder; give a checkpoint folder, or true for the newest",
                path=asked,
                field="resume_from_checkpoint",
            )
        return Path(asked)
    if asked:
        found = checkpoints.newest(output, listener.on_notice)
        if found is None:
            listener.on_notice(f"no checkpoint in {output}: starting from the beginning")
        return found
    present = [path.name for _, path in checkpoints.listed(output)]
    present += [name for name in (METRICS, "adapter_config.json", "model.safetensors") if (output / name).exists()]
    if present and not settings.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {output} holds another run ({', '.join(present[:3])}); continue it with "
            "resume_from_checkpoint: true, replace it with overwrite_output_dir: true, or choose another folder",
            field="output_dir",
            path=str(output),
            found=present,
        )
    checkpoints.remove_all(output)
    (output / METRICS).unlink(missing_ok=True)  # it would say that the new run is complete
    return None


@contextmanager
def threads(settings: TrainSettings, kept: checkpoints.Checkpoint | None) -> Iterator[None]:
    """The number of CPU threads for the time of the run: asked for, or the checkpoint's, because sums depend on it."""
    before = torch.get_num_threads()
    wanted = settings.num_threads
    if wanted is None and kept is not None and "num_threads" not in settings.allow_change:
        wanted = kept.state["conditions"]["run"]["num_threads"]
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
