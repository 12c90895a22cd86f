"""In which precision trained and frozen tensors are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from deltatune.errors import AdapterNameError, ConfigError
from deltatune.helpers.bare import bare
from deltatune.helpers.verbs import known_names
from deltatune.inject import adapted_layers
from deltatune.shared import shared_modules

NARROW = {
    getattr(torch, name)
    for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
}


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Keep an adapter in float32 where it is in half precision or less; nothing with `autocast_adapter_dtype=False`.

    Only what it trains is widened. The layer's activations stay in the precision of the base.

    Raises:
        AdapterNameError: No layer of the model has such an adapter.
    """
    if not autocast_adapter_dtype:
        return
    parts = [layer.adapters[adapter_name] for _, layer in adapted_layers(model) if adapter_name in layer.adapters]
    if not parts:
        raise AdapterNameError(
            f"cast_adapter_dtype: no layer has an adapter named {adapter_name!r}; there are {known_names(model)}",
            field="adapter_name",
            found=adapter_name,
            expected=known_names(model),
        )
    shared = shared_modules(bare(model)).get(adapter_name)
    for part in parts if shared is None else [*parts, shared]:
        for parameter in part.parameters():
            if parameter.dtype in NARROW:
                parameter.data = parameter.data.float()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters in `dtype`, trained ones in float32, for training with automatic mixed precision.

    Quantised weights and other integers stay as they are.

    Raises:
        ConfigError: `dtype` is none of floating point numbers.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(
            f"cast_mixed_precision_params: dtype={dtype!r}, expected torch.bfloat16 or torch.float16",
            field="dtype",
            found=dtype,
        )
    for parameter in model.parameters():
        # quantised weights are subclasses with codes inside, whatever they say their type is
        if parameter.is_floating_point() and type(parameter) in (nn.Parameter, torch.Tensor):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the block adapters do not cast their input, which here they never do.

    PEFT casts a layer's input to the precision of the adapter, which disturbs programs that cast layer by layer. Here
    an adapter's tensors are cast to the precision of the input. The block is for programs that ask for it.
    """
    yield
