"""What a method starts from when the user sets nothing."""

from __future__ import annotations

from deltatune.config import PeftType
from deltatune.prompts.prefix import p_tuning_v2_options

# A prefix, a scaling vector and a rotation move far from their start, weights of a pretrained model do not.
LEARNING_RATES: dict[str, float] = {
    "full": 5e-5,
    "LORA": 2e-4,
    "PREFIX_TUNING": 1e-2,
    "CARTRIDGE": 1e-2,
    "ADAPTION_PROMPT": 9e-3,
    "PROMPT_TUNING": 3e-2,
    "P_TUNING": 1e-3,
    "MULTITASK_PROMPT_TUNING": 3e-2,
    "CPT": 1e-3,
    "IA3": 8e-3,
    "OFT": 1e-3,
    "HRA": 1e-3,
}
PROJECTED_PREFIX = 1e-3  # through the MLP each step moves every virtual token

FULL = "full"
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


def peft_type(method: str) -> PeftType | None:
    """The registry's key; None for full fine-tuning."""
    return None if method == FULL else PeftType(PRESETS.get(method, method).upper())


def learning_rate(method: str, options: dict[str, object]) -> float:
    method = PRESETS.get(method, method)
    if method == "prefix_tuning" and options.get("prefix_projection"):
        return PROJECTED_PREFIX
    return LEARNING_RATES.get(FULL if method == FULL else method.upper(), 1e-3)


def with_defaults(method: str, options: dict[str, object]) -> dict[str, object]:
    """The options of the method with those filled in that a training run, other than the bare config, chooses."""
    chosen: dict[str, object] = {}
    if method in ("lora", "oft", "hra"):
        chosen["target_modules"] = "all-linear"
    if method == "lora":
        rank = options.get("r", 8)
        chosen |= {"r": rank, "lora_alpha": 2 * rank if isinstance(rank, int) else rank}
    if method in ("prefix_tuning", "cartridge", "prompt_tuning", "p_tuning", "multitask_prompt_tuning"):
        chosen["num_virtual_tokens"] = 20
    if method == "adaption_prompt":
        chosen["adapter_len"] = 10
    if method == "p_tuning_v2":
        chosen |= p_tuning_v2_options(None)
    return chosen | options
