"""From the settings' method to the config of the registry and the adapted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from deltatune.config import PeftConfig, PeftType, TaskType
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoRA
from deltatune.registry import METHODS
from deltatune.suggest import did_you_mean
from deltatune.train.defaults import FULL, PRESETS, method_name, peft_type

TASK_TYPES = {
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "causal": TaskType.CAUSAL_LM,
    "chat": TaskType.CAUSAL_LM,
    "classification": TaskType.SEQ_CLS,
    "token_classification": TaskType.TOKEN_CLS,
    "question_answering": TaskType.QUESTION_ANS,
}
# set by us or by loading, never by a user of `train`
_FIXED = {"task_type", "peft_type", "inference_mode", "auto_mapping", "peft_version", "base_model_name_or_path"}


def method_names() -> list[str]:
    """Every method `train` knows."""
    return [*sorted([*(method.name for method in METHODS.values()), *PRESETS]), FULL]


def normal_method(name: Any) -> str:
    if isinstance(name, PeftType):
        name = name.value
    plain = method_name(name) if isinstance(name, str) else repr(name)
    if plain not in method_names():
        raise ConfigError(
            f"method={name!r} is not known{did_you_mean(plain, method_names())}; there are {', '.join(method_names())}",
            field="method",
            found=name,
            expected=method_names(),
        )
    return plain


def method_fields(method: str) -> set[str]:
    """The options the method's config takes."""
    member = peft_type(method)
    if member is None:
        return set()
    return {field.name for field in dataclasses.fields(METHODS[member].config)} - _FIXED


def takes_tasks(method: str) -> bool:
    """Whether the adapter depends on the task of each row."""
    return bool(method_fields(method) & {"num_tasks", "n_tasks"})


def is_lora(method: str) -> bool:
    """Whether it trains LoRA's two factors, which LoRA's optimizers are for."""
    member = peft_type(method)
    return member is not None and issubclass(METHODS[member].adapter or object, LoRA)


def peft_config(method: str, task: str, options: dict[str, Any]) -> PeftConfig:
    member = peft_type(method)
    assert member is not None
    return METHODS[member].config(task_type=TASK_TYPES[task], **options)


def positions_taken(method: str, task: str, options: dict[str, Any]) -> int:
    """Positions of the base that virtual tokens use up, so that rows must be shorter by as many."""
    member = peft_type(method)
    if member is None or not getattr(METHODS[member].graft, "takes_positions", False):
        return 0
    return peft_config(method, task, options).length  # type: ignore[attr-defined]


def adapt(
    model: nn.Module,
    method: str,
    task: str,
    options: dict[str, Any],
    begin: Callable[[nn.Module, PeftConfig], None] = lambda model, config: None,
) -> nn.Module:
    """The model to train: adapted, or as it is with every parameter trainable.

    Args:
        begin: Called with the model and the config before the adapter is there.
    """
    if method == FULL:
        return model.requires_grad_(True)
    from deltatune import get_peft_model

    config = peft_config(method, task, options)
    begin(model, config)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; adapted models bind the recomputation to their adapters."""
    from deltatune import PeftModel

    renamed = getattr(model, "activation_checkpointing_enable", None)  # its name in newer transformers
    if renamed is None or isinstance(model, PeftModel):
        model.gradient_checkpointing_enable()
    else:
        renamed()
