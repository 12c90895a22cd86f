"""What can be told to be wrong with an adapter's tensors without its base model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deltatune.config import PeftConfig
from deltatune.errors import PeftError
from deltatune.inputs.encoder import ROWS, STATE
from deltatune.inputs.prompt import Input
from deltatune.prompts.config import KeyValueConfig
from deltatune.prompts.files import ENCODER, NAMES
from deltatune.registry import METHODS
from deltatune.storage.folder import EDITABLE
from deltatune.targets import pattern_value


def find_problems(config: PeftConfig, tensors: dict[str, Tensor], facts: dict[str, Any] | None) -> list[str]:
    """Each problem in one line; empty when nothing is wrong."""
    found = [*_values(tensors), *_header(config, facts)]
    if not tensors:
        return ["the file holds no tensors"]
    if isinstance(config, KeyValueConfig):
        return [*found, *_prefix(config, tensors)]
    if METHODS[config.peft_type].graft is Input:  # type: ignore[index]
        return [*found, *_rows(config, tensors)]
    found += [*_surplus(config, tensors), *_gaps(config, tensors)]
    stem = METHODS[config.peft_type].pairs  # type: ignore[index]
    return [*found, *(_pairs(config, tensors, stem) if stem else ())]


def _values(tensors: dict[str, Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            yield f"{name} holds {count} values that are not finite"


def _header(config: PeftConfig, facts: dict[str, Any] | None) -> Iterator[str]:
    saved = (facts or {}).get("config")
    if isinstance(saved, dict):
        present = config.to_file_dict()
        differing = sorted(k for k in saved if k not in EDITABLE and k in present and present[k] != saved[k])
        if differing:
            yield f"adapter_config.json was changed after saving: {', '.join(differing)} (the saved values are used)"


def _surplus(config: PeftConfig, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Tensors that belong neither to the method nor to modules that were trained whole."""
    method = METHODS[config.peft_type]  # type: ignore[index]
    whole: set[str] = set(getattr(config, "modules_to_save", None) or ())
    if getattr(config, "trainable_token_indices", None):
        whole.add("token_adapter")
    for name in tensors:
        parts = name.split(".")
        own = any(part.startswith(method.key_prefix) for part in parts)
        trained = getattr(config, "bias", "none") != "none" and parts[-1] == "bias"
        if not own and not trained and not whole & set(parts) and ".base_layer." not in name:
            yield f"{name} belongs neither to {method.name.upper()} nor to modules_to_save"


def _gaps(config: PeftConfig, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Layers in which a tensor is missing that all others have.

    Nothing can be told where layers were chosen, or where several have a tensor together.
    """
    if getattr(config, "layers_to_transform", None) is not None or METHODS[config.peft_type].shared:  # type: ignore
        return
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        first = re.search(r"\.(\d+)\.", name)
        if first:
            numbers[f"{name[: first.start()]}.*.{name[first.end() :]}"].add(int(first[1]))
    for name, present in numbers.items():
        missing = sorted(set(range(max(present) + 1)) - present)
        if missing and len(missing) < len(present):  # an attention in every fourth layer is a model's design
            yield f"{name} is missing in layer {', '.join(map(str, missing))}"


def _pairs(config: Any, tensors: dict[str, Tensor], stem: str) -> Iterator[str]:
    """Factors that come in pairs of one rank, the config's; where every B is zero, nothing was ever trained."""
    zeros, first, second = 0, rf"\.{stem}_A\b", rf"\.{stem}_B\b"
    pairs = [name for name in tensors if re.search(first, name)]
    for name in pairs:
        other = re.sub(first, f".{stem}_B", name)
        path = re.sub(r"^(base_model\.)?(model\.)?", "", name.split(f".{stem}_A")[0])
        if other not in tensors:
            yield f"{name} has no {other.rpartition(f'.{stem}_')[2]} beside it"
            continue
        rank = pattern_value(config.rank_pattern, path, config.r)
        if tensors[name].shape[0] != rank and not _of_experts(config, tensors[name].shape[0], path):
            yield f"{name} has rank {tensors[name].shape[0]}, the config says {rank}"
        zeros += not tensors[other].any()
    for name in tensors:
        if name.endswith(".bias"):  # of B alone
            continue
        if re.search(second, name) and re.sub(second, f".{stem}_A", name) not in tensors:
            yield f"{name} has no {stem}_A beside it"
    if pairs and zeros == len(pairs):
        yield f"every {stem}_B is zero: the adapter changes nothing, it was never trained"


def _of_experts(config: Any, rows: int, path: str) -> bool:
    """Whether these may be the factors of all experts in a parameter, one below the other."""
    owners = {name.rpartition(".")[0].rpartition(".")[2] for name in config.target_parameters or ()}
    ranks = {config.r, *config.rank_pattern.values()}
    named = "" in owners or path.removesuffix(".base_layer").rpartition(".")[2] in owners
    return named and any(rows % rank == 0 for rank in ranks)


def _prefix(config: KeyValueConfig, tensors: dict[str, Tensor]) -> Iterator[str]:
    name = NAMES[config.layout or "native"]
    rows = tensors.get(name)
    whole = set(config.modules_to_save or ())
    rest = [k for k in tensors if k != name and not k.startswith(ENCODER) and not whole & set(k.split("."))]
    for key in rest:
        yield f"{key} is not a tensor of a prefix with layout={config.layout!r}"
    if rows is None:
        yield f"{name} is missing"
        return
    try:
        width = sum(h * d + hv * dv for h, d, hv, dv in config.shapes)
    except PeftError as error:
        yield str(error)
        return
    if tuple(rows.shape) != (config.num_virtual_tokens, width):
        yield f"{name} has shape {tuple(rows.shape)}, the config says {(config.num_virtual_tokens, width)}"
    elif not torch.any(rows):
        yield f"{name} is zero everywhere"


def _rows(config: Any, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Rows before the embedded tokens; what a method keeps beside them has names of its own."""
    rows, whole = tensors.get(ROWS), set(config.modules_to_save or ())
    for key in tensors:
        own = key == ROWS or key.startswith(STATE) or key in ("prefix_task_cols", "prefix_task_rows")
        if not own and not whole & set(key.split(".")):
            yield f"{key} belongs neither to {config.peft_type.name} nor to modules_to_save"
    expected = ((config.num_virtual_tokens or 0) * (config.num_transformer_submodules or 1), config.token_dim)
    if rows is None:
        yield f"{ROWS} is missing"
    elif None not in expected and tuple(rows.shape) != expected:
        yield f"{ROWS} has shape {tuple(rows.shape)}, the config says {expected}"
    elif not torch.any(rows):
        yield f"{ROWS} is zero everywhere"
