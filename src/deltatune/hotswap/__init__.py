"""Putting other values into an adapter that is in use: PEFT's functions, for every layer method."""

from deltatune.hotswap.compatible import check_hotswap_configs_compatible
from deltatune.hotswap.prepare import prepare_model_for_compiled_hotswap
from deltatune.hotswap.swap import hotswap_adapter, hotswap_adapter_from_state_dict

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]
