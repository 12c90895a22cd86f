"""Names of methods in settings, and what a run starts from when the user sets nothing: each method's file says it."""

from __future__ import annotations

from deltatune.config import PeftType
from deltatune.prompts.prefix import p_tuning_v2_options
from deltatune.registry import METHODS

FULL = "full"
FULL_LEARNING_RATE = 5e-5
PRESETS = {"p_tuning_v2": "prefix_tuning"}  # names of a method with choices of their own
NICKNAMES = {
    "prefix": "prefix_tuning",
    "prompt": "prompt_tuning",
    "ptuning": "p_tuning",
    "ptuning_v2": "p_tuning_v2",
    "multitask": "multitask_prompt_tuning",
    "none": FULL,
    "full_finetuning": FULL,
    "finetuning": FULL,
    "ia_3": "ia3",
}


def method_name(name: str) -> str:
    """The method as settings write it: lower case, `full` for no adapter at all."""
    plain = name.strip().lower().replace("-", "_")
    return NICKNAMES.get(plain, plain)


def peft_type(method: str) -> PeftType | str | None:
    """The registry's key; None for full fine-tuning."""
    if method == FULL:
        return None
    name = PRESETS.get(method, method).upper()
    return METHODS[name].peft_type if name in METHODS else PeftType(name)


def learning_rate(method: str, options: dict[str, object]) -> float:
    member = peft_type(method)
    if member is None:
        return FULL_LEARNING_RATE
    rate = METHODS[member].learning_rate
    return rate(options) if callable(rate) else rate


def with_defaults(method: str, options: dict[str, object]) -> dict[str, object]:
    """The options of the method with those filled in that a training run, other than the bare config, chooses."""
    member = peft_type(method)
    chosen = {} if member is None else METHODS[member].train_options(options)
    if method == "p_tuning_v2":
        chosen |= p_tuning_v2_options(None)
    return chosen | options


def for_run(method: str, options: dict[str, object], steps: int) -> dict[str, object]:
    """The options of the method with those filled in that follow from the number of optimizer steps."""
    member = peft_type(method)
    chosen = {} if member is None else METHODS[member].run_options(options, steps)
    return chosen | options
