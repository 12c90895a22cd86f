"""lm-evaluation-harness on the models as they stand.   https://github.com/EleutherAI/lm-evaluation-harness"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from deltatune.data.example import TEXT_TASKS
from deltatune.errors import ConfigError, LimitError
from deltatune.generate.load import Ready


def check_harness(task: str) -> None:
    """Raises ConfigError where it cannot be asked, LimitError where it is not installed."""
    if task not in TEXT_TASKS:
        raise ConfigError(
            f"lm-evaluation-harness asks models that write text, these are for {task}; leave lm_eval out",
            field="lm_eval",
            found=task,
        )
    if find_spec("lm_eval") is None:
        raise LimitError("lm-evaluation-harness is not installed: pip install 'deltatune[harness]'", field="lm_eval")


def run_harness(
    ready: Ready, tasks: Sequence[str], batch_size: int, limit: int | None = None, include: str | None = None
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value. Tasks are the harness's own, which mostly fetch their data from the hub.

    Args:
        limit: Rows of each task.
        include: A folder with tasks of your own.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    kind = "seq2seq" if ready.task == "seq2seq" else "causal"
    language_model = HFLM(
        pretrained=ready.model,  # type: ignore[arg-type]
        tokenizer=ready.tokenizer,
        backend=kind,
        batch_size=batch_size,
        max_length=ready.encoder.max_length,
    )
    found: Any = lm_eval.simple_evaluate(
        model=language_model,
        tasks=list(tasks),
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=include),
    )
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Metrics by their names without the harness's `,none` for the absence of a filter."""
    plain = {name.removesuffix(",none"): value for name, value in values.items()}
    return {name: float(value) for name, value in plain.items() if isinstance(value, int | float) and name != "alias"}
