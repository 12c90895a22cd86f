"""`layer.update_layer(...)`: one more adapter on a layer that has some, as programs ask PEFT's layers for it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from deltatune import inject
from deltatune.config import PeftConfig
from deltatune.errors import ConfigError

_SIZES = ("lora_alpha", "alpha")  # what a method calls the number that PEFT's layers take after the rank
_OF_MODELS = ("modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules", "trainable_token_indices")


def update_layer(layer: Any, adapter_name: str, *sizes: Any, config: PeftConfig | None = None, **options: Any) -> None:
    """Put an adapter on this layer alone; one that has the name already is built anew.

    Args:
        sizes: Rank and alpha, as far as the method has them; perhaps the config behind them.
        config: Of the adapter; what is given beside it counts instead of its own. LoRA with its defaults if left out.
        options: Fields of the config; others are passed over, as PEFT's layers do.

    Raises:
        PeftError: The config does not fit the layer, which is left as it was.
    """
    from deltatune.lora.config import LoraConfig

    numbers = list(sizes)
    if config is None and numbers and isinstance(numbers[-1], PeftConfig):
        config = numbers.pop()
    own = copy.copy(LoraConfig() if config is None else config)
    if not hasattr(own, "target_modules"):
        raise ConfigError(f"update_layer: {type(own).__name__} is of no method that adapts layers", field="config")
    alpha = next((name for name in _SIZES if hasattr(own, name)), None)
    given = {**dict(zip(("r", alpha), numbers)), **options}
    for name, value in {**given, **dict.fromkeys(_OF_MODELS), "target_modules": {"layer"}}.items():
        if name is not None and hasattr(own, name):
            setattr(own, name, value)
    before = layer.adapters._modules.get(adapter_name)
    layer.drop(adapter_name)
    try:
        inject.graft(nn.ModuleDict({"layer": layer}), own, adapter_name, layer.selection)
    except BaseException:
        if before is not None:
            layer.add(adapter_name, before)
        raise
    layer.adapters[adapter_name].requires_grad_(adapter_name in layer.selection.active)
