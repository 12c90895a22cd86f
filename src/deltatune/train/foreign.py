"""What settings files of LLaMA-Factory, Axolotl and transformers' scripts say that is no setting here.

Some of it is what `deltatune train` does anyway, or changes no result; that is passed over. Some of it is asked for and
not done; that is refused with the reason, since to pass over it would be to do something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltatune.data.parse import kind_of
from deltatune.errors import ConfigError

# names whose values change no result: caches, workers, curves that the report has
WITHOUT_EFFECT = frozenset(
    {
        *("do_eval", "plot_loss", "overwrite_cache", "preprocessing_num_workers", "dataset_prepared_path"),
        *("dataset_processes", "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "ddp_timeout"),
        *("ddp_find_unused_parameters", "include_num_input_tokens_seen", "include_tokens_per_second", "logging_dir"),
    }
)
# names with the value that they have here, and why they have no other
FIXED: dict[str, tuple[Any, str]] = {
    "stage": ("sft", "rows with their answers are what is trained on; preferences and rewards are not"),
    "do_train": (True, "that is what the command does; deltatune eval scores without training"),
    "do_predict": (False, "test_file names rows to score at the end, and deltatune generate answers a file"),
    "trust_remote_code": (
        False,
        "code that comes with a model is never run; take one that transformers has itself",
    ),
    "save_safetensors": (True, "nothing is ever written as a pickle"),
}
SWITCHES = {"do_eval", "plot_loss", "overwrite_cache", *(name for name in FIXED if name != "stage")}  # true or false
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")  # one formula, here too


def passed_over(key: str, value: Any) -> bool:
    """Whether a setting of another program needs nothing done.

    Raises:
        ConfigError: It asks for something that is not done here.
    """
    if key in WITHOUT_EFFECT:
        return True
    if key not in FIXED:
        return False
    fixed, why = FIXED[key]
    if value is None or str(value).lower() == str(fixed).lower():
        return True
    raise ConfigError(f"{key}={value!r} is not done, expected {fixed}: {why}", field=key, found=value, expected=fixed)


def translated(key: str, value: Any) -> tuple[str, Any]:
    """A name and value of another program in our words; as they are where nothing has to be said otherwise."""
    if key in ("optim", "optimizer"):
        return "optimizer", "adamw" if value in ADAMW else value
    if key == "bf16" and value == "auto":
        return "dtype", "auto"
    if key == "datasets" and isinstance(value, list):
        return "train_file", [_path(entry) for entry in value]
    if key == "dataset" and isinstance(value, str) and kind_of(Path(value)) and Path(value).is_file():
        return "train_file", value
    return key, value


def _path(entry: Any) -> str:
    """Of an entry of Axolotl's `datasets`; the form of its rows is found by their columns."""
    known = isinstance(entry, Mapping) and set(entry) <= {"path", "type", "ds_type"}
    if known and isinstance(entry.get("path"), str) and isinstance(entry.get("type"), (str, type(None))):
        return entry["path"]
    raise ConfigError(
        f"datasets: {dict(entry) if isinstance(entry, Mapping) else entry!r} says more than a path and the name of a "
        "type; name the files with train_file, and their columns with column_mapping",
        field="datasets",
        found=entry,
    )
