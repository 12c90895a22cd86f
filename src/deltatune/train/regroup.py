"""A run that goes on in another number of processes: a step keeps its rows, so that every row keeps its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deltatune.errors import ResumeError
from deltatune.train.settings import TrainSettings

MICRO, ACCUMULATION, PROCESSES = "per_device_train_batch_size", "gradient_accumulation_steps", "processes"
PARTS = (MICRO, ACCUMULATION, PROCESSES)


def regroup(
    settings: TrainSettings, stored: dict[str, Any], processes: int, source: str, notice: Callable[[str], None]
) -> TrainSettings:
    """Settings under which `processes` do in a step what those of the checkpoint did: same rows, same order.

    Args:
        stored: Conditions of the checkpoint, brought to the new number here, since the difference is dealt with.

    Raises:
        ResumeError: The rows of a step cannot be shared out evenly.
    """
    if stored[PROCESSES] == processes:
        return settings
    rows = stored[MICRO] * stored[ACCUMULATION] * stored[PROCESSES]
    share, rest = divmod(rows, processes)
    if rest:
        raise ResumeError(
            f"{source} was written by {stored[PROCESSES]} processes with {rows} rows a step, which {processes} cannot "
            f"share evenly; resume with a number of processes that divides {rows}",
            path=source,
            field=PROCESSES,
            found=processes,
            expected=[number for number in range(1, rows + 1) if rows % number == 0],
        )
    most = min(settings.per_device_train_batch_size, share)
    micro = next(size for size in range(most, 0, -1) if share % size == 0)
    told = {MICRO: micro, ACCUMULATION: share // micro}
    notice(
        f"{stored[PROCESSES]} processes then, {processes} now: {MICRO} {micro} and {ACCUMULATION} {share // micro} "
        f"keep the {rows} rows of a step"
    )
    stored.update({**told, PROCESSES: processes})
    return settings.model_copy(update=told)
