"""Small functions of `peft.utils` that programs import: names of modules, batches, tensors, matching."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import inject
from deltatune.errors import ConfigError
from deltatune.model import PeftModel
from deltatune.patterns import name_matches

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def bloom_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values of L layers in the layout that Bloom's cache had before transformers 4.42.

    Args:
        past_key_values: Parts that make (2 L, B, heads, n, head_dim): all keys, then all values.

    Returns:
        Per layer keys (B heads, head_dim, n) and values (B heads, n, head_dim).
    """
    keys, values = torch.cat(tuple(past_key_values)).chunk(2)
    layers, batch, heads, length, width = keys.shape
    keys = keys.transpose(2, 3).reshape(layers, batch * heads, width, length)  # as PEFT has it
    return tuple(zip(keys, values.flatten(1, 2)))


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Parent, module and the module's name in its parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ConfigError("either input_ids or inputs_embeds has to be given", field="input_ids")
    return given.shape[0]


def _get_input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """The last part of the path of a model's input embeddings."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    wanted = model.get_input_embeddings()
    found = (name for name, module in model.named_modules() if module is wanted)
    return next((name.rpartition(".")[2] for name in found), default)


def _is_valid_match(key: str, target_key: str) -> bool:
    return f".{key}".endswith(f".{target_key}")


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first pattern that matches the end of a path, or the path itself."""
    return next((key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match)), key_to_match)


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a config targets the module at a path."""
    excluded = getattr(config, "exclude_modules", None)
    if excluded and name_matches(excluded, key):
        return False
    return config.target_modules is not None and name_matches(config.target_modules, key)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    for parameter in inject.adapter_parameters(_bare(model), adapter_name):
        parameter.requires_grad_(False)


def _bare(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight, turned if the layer stores it as (in, out)."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def infer_device() -> str:
    """The accelerator's name, or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tensors that share their memory have in common: device, address and size of the storage."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def str_to_bool(value: str) -> int:
    """1 for y, yes, t, true, on, 1; 0 for their opposites."""
    answers = {**dict.fromkeys(("y", "yes", "t", "true", "on", "1"), 1)}
    answers |= dict.fromkeys(("n", "no", "f", "false", "off", "0"), 0)
    if value.lower() not in answers:
        raise ConfigError(f"{value!r} is neither true nor false; use one of {sorted(answers)}", found=value)
    return answers[value.lower()]


def get_device_map(model: Any) -> dict[str, Any]:
    """Where the parts of a model are."""
    return getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module, perhaps with the same parameter objects."""
    import copy

    return copy.deepcopy(module, {id(p): p for p in module.parameters()} if share_weights else {})


def find_parameter_name_by_module(model: nn.Module, module: nn.Module) -> str:
    """The path of a module; empty where the model does not hold it."""
    return next((name for name, part in model.named_modules() if part is module), "")
