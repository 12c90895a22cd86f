"""The conditions of a run; a resumed run must have the same, and each difference is named."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from deltatune.errors import ConfigError, ResumeError
from deltatune.suggest import did_you_mean
from deltatune.train.settings import TrainSettings

# settings that do not change which numbers are learnt
HARMLESS = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_change", "logging_steps", "save_steps",
    "save_total_limit", "report_to", "num_samples", "num_scored", "num_beams", "eval_before", "test_file",
    "per_device_eval_batch_size", "num_threads", "profile", "shard_across", "zero3_offload",
    "device_map", "offload_folder",
    # where the rows come from may move: their content is compared instead
    "train_file", "eval_file", "dataset", "dataset_config", "model_name_or_path",
}  # fmt: skip
# only these decisions hang on evaluation
EVALUATED = {"eval_steps", "max_eval_samples", "metric_for_best_model", "predict_with_generate"}


def conditions(
    settings: TrainSettings, data: str, eval_data: str | None, base: dict[str, Any], processes: int
) -> dict[str, Any]:
    """Everything that must be equal for a resumed run to end where the uninterrupted one does."""
    resolved = settings.resolved()
    chooses = settings.load_best_model_at_end or settings.early_stopping_patience is not None
    left_out = HARMLESS if chooses else HARMLESS | EVALUATED
    kept: dict[str, Any] = {key: value for key, value in resolved.items() if key not in left_out}
    kept["training data"] = data
    if chooses:
        kept["evaluation data"] = eval_data
        if settings.predict_with_generate:
            kept |= {name: resolved[name] for name in ("num_scored", "num_beams")}
    kept["base model"] = base
    kept["num_threads"] = torch.get_num_threads()
    kept["processes"] = processes
    return kept


def machine() -> dict[str, str]:
    """What bit-equality also hangs on. A difference is told, not refused: work must be able to move on."""
    import accelerate
    import transformers

    return {
        "machine": f"{platform.machine()} {_processor()}".strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def compare(
    stored: dict[str, Any], present: dict[str, Any], allowed: Iterable[str], source: str, notice: Callable[[str], None]
) -> None:
    """Refuse to resume under other conditions, unless each difference is in `allowed` ("all" allows any).

    Raises:
        ResumeError: Lists every difference with both values.
    """
    allowed = set(allowed)
    names = sorted(stored.keys() | present.keys())
    for name in sorted(allowed - {"all"}):
        if name not in names:
            raise ConfigError(
                f"allow_change: {name!r} is no condition of the checkpoint{did_you_mean(name, names)}",
                field="allow_change",
                found=name,
                expected=names,
            )
    changed = [name for name in names if stored.get(name) != present.get(name)]
    refused = [name for name in changed if name not in allowed and "all" not in allowed]
    if refused:
        told = "; ".join(
            f"{name}: {_short(stored.get(name))} then, {_short(present.get(name))} now" for name in refused
        )
        raise ResumeError(
            f"{source} was written under other conditions ({told}); resume with the old ones, allow each with "
            f"allow_change: {refused}, or start anew with overwrite_output_dir: true",
            path=source,
            field=refused[0],
            found={name: present.get(name) for name in refused},
            expected={name: stored.get(name) for name in refused},
        )
    for name in changed:
        notice(f"{name} changed from {_short(stored.get(name))} to {_short(present.get(name))}, as allowed")


def compare_machines(stored: dict[str, str], notice: Callable[[str], None]) -> None:
    present = machine()
    for name in present:
        if stored.get(name) != present[name]:
            notice(
                f"{name} is {present[name]}, the checkpoint was written with {stored.get(name)}: last bits may differ"
            )


def base_facts(model: nn.Module, head: Iterable[str] = ()) -> dict[str, Any]:
    """The fingerprint of the base before it is adapted."""
    from deltatune.storage.fingerprint import fingerprint

    return fingerprint(model, head)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def _short(value: Any) -> str:
    if isinstance(value, dict) and "values" in value:
        return f"{value.get('class')} {str(value.get('values'))[:12]}"
    text = repr(value) if not (isinstance(value, str) and len(value) == 64) else value[:12]
    return text if len(text) <= 60 else text[:57] + "..."


def refuse_fewer_steps(source: str, made: int, total: int) -> None:
    """
    Raises:
        ResumeError: The run was shortened to fewer steps than the checkpoint has made.
    """
    if made > total:
        raise ResumeError(
            f"{source} has made {made} steps, more than the {total} of this run; raise max_steps or num_train_epochs, "
            "or resume from an earlier checkpoint",
            field="max_steps",
            path=source,
            found=made,
            expected=total,
        )
