"""Which adapters can take the place of which, by their configs."""

from __future__ import annotations

from deltatune.config import PeftConfig
from deltatune.errors import MismatchError


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Whether an adapter of the second config can be swapped in for one of the first.

    Ranks, scalings (`lora_alpha`, `use_rslora`, patterns) and layers may differ.

    Raises:
        MismatchError: They are of different methods, or differ in a field that decides what a layer computes.
    """
    if config0.peft_type != config1.peft_type:
        one, other = (getattr(config.peft_type, "value", config.peft_type) for config in (config0, config1))
        raise MismatchError(
            f"hot-swap: an adapter of {other} cannot take the place of one of {one}; load it under a name of its own",
            field="peft_type",
            found=other,
            expected=one,
        )
    for field in type(config0).alike_in_swap:
        present, new = getattr(config0, field), getattr(config1, field)
        if present != new:
            raise MismatchError(
                f"hot-swap: {field}={new!r} of the new adapter, {field}={present!r} of the present one; they have to "
                "be equal; load it under a name of its own",
                field=field,
                found=new,
                expected=present,
            )
