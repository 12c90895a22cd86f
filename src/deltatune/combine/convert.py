"""`convert_to_lora`, `save_as_lora`: an adapter of any method that a weight can hold, as LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.combine import lora
from deltatune.combine.changes import check, layers_of, obstacle, read
from deltatune.combine.product import Keep
from deltatune.errors import AdapterNameError, ConversionError, MergeError
from deltatune.lora.config import LoraConfig
from deltatune.notice import warn
from deltatune.state_dict import ROOT

LOST_WORTH_SAYING = 0.1  # of a layer's change
ROUNDED = 1e-6  # of a layer's change is lost by factors in float32, beside what lower ranks leave out


class Converted(tuple[LoraConfig, dict[str, Tensor]]):
    """(config, tensors by file key), and how good they are.

    Attributes:
        errors: By layer, |B A - (W' - W)| / |W' - W|.
    """

    errors: dict[str, float]

    @classmethod
    def of(cls, config: LoraConfig, tensors: dict[str, Tensor], errors: dict[str, float]) -> Converted:
        made = cls((config, tensors))
        made.errors = errors
        return made


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float | None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    *,
    max_error: float | None = None,
) -> Converted:
    """An adapter as LoRA with scaling one; the model is left as it is.

    Where a method's change is a product of two factors (LoRA, VeRA, MiSS, DeLoRA and their like) these are decomposed,
    at a cost of the rank and not of the matrix; of other methods W' - W is. A changed bias becomes that of B.

    Args:
        model: A `PeftModel`, or a model with adapters in it (`inject_adapter_in_model`).
        rank: An int: the rank on every layer. A float in (0, 1]: on each layer the lowest that holds this share of the
            squared singular values. None: what `max_error` needs.
        adapter_name: The adapter to convert.
        progressbar: Show one (needs tqdm).
        compile_kwargs: Compile the decomposition of dense changes, with these arguments of `torch.compile`.
        max_error: Instead of a rank: on each layer the lowest whose |B A - (W' - W)| / |W' - W| is at most this.

    Returns:
        The config and the tensors under the keys of a file; `errors` has the relative error of every layer.

    Raises:
        ConversionError: No weight can hold the method, or LoRA does not reach a layer of it; also a TypeError.
        MergeError: The rank is none, or too high for a layer.
    """
    peft_model, base = _parts(model)
    _known(peft_model, adapter_name)
    check(base, adapter_name)
    keep, layers = _kept(rank, max_error), list(layers_of(base, adapter_name))
    config = None if peft_model is None else peft_model.peft_config[adapter_name]
    copies = lora.Copies.of(base, {} if config is None else {adapter_name: config})
    options = {} if compile_kwargs is None else {"decompose": _compiled(compile_kwargs)}
    found: dict[str, lora.Factors] = {}
    for path, layer in _shown(layers, progressbar):
        _refuse_too_high(keep, path, layer.as_map())
        change = read(layer, adapter_name)
        found[path] = lora.factors(change.weight, change, keep, change.bias, **options)
    found = lora.of_one_rank(base, found)
    made = lora.config_for(base, found, config)
    made.modules_to_save = copies.names(base)
    errors = {path: layer.error for path, layer in found.items()}
    _warn(errors, adapter_name)
    root = "" if peft_model is None else ROOT
    return Converted.of(made, lora.tensors(base, made, found, copies, root), errors)


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float | None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    *,
    max_error: float | None = None,
) -> dict[str, float]:
    """`convert_to_lora` into a folder that loads here and in PEFT; returns the relative error of every layer."""
    from deltatune.storage.folder import write

    converted = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs, max_error=max_error)
    config, tensors = converted
    peft_model, base = _parts(model)
    if peft_model is None:
        tensors = {f"{ROOT}{key}": tensor for key, tensor in tensors.items()}
    write(Path(path), config, tensors, base)
    return converted.errors


def supports_lora_conversion(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether `convert_to_lora` can turn an adapter of the model into LoRA."""
    peft_model, base = _parts(model)
    _known(peft_model, adapter_name, refuse=False)
    layers = [layer for _, layer in layers_of(base, adapter_name)]
    return bool(layers) and all(obstacle(layer, adapter_name) is None for layer in layers)


def _parts(model: nn.Module) -> tuple[Any, nn.Module]:
    """The `PeftModel` if it is one, and the model that holds the layers."""
    from deltatune.model import PeftModel

    model = getattr(model, "_orig_mod", model)
    return (model, model.get_base_model()) if isinstance(model, PeftModel) else (None, model)


def _known(peft_model: Any, name: str, refuse: bool = True) -> None:
    if peft_model is None:
        return
    if name not in peft_model.peft_config:
        there = list(peft_model.peft_config)
        raise AdapterNameError(
            f"adapter_name: no adapter named {name!r}; there are {there}", field="adapter_name", found=name
        )
    if refuse and name in peft_model.prompts:
        raise ConversionError(
            f"adapter {name!r} is {peft_model.prompts[name].unmergeable}; it cannot become LoRA", found=name
        )


def _kept(rank: Any, max_error: float | None) -> Keep:
    number = isinstance(rank, (int, float)) and not isinstance(rank, bool)
    if (rank is None) == (max_error is None):
        raise MergeError(f"rank={rank!r}, max_error={max_error!r}: give one of the two", field="rank", found=rank)
    if max_error is not None:
        if not 0 < max_error < 1:
            raise MergeError(f"max_error={max_error!r}, expected a share in (0, 1)", field="max_error", found=max_error)
        return Keep(missing=max(max_error**2 - ROUNDED**2, 0.0))
    if not number or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise MergeError(
            f"rank={rank!r}, expected an integer of 1 or more, or a share of the squared singular values in (0, 1]",
            field="rank",
            found=rank,
        )
    return Keep(rank) if isinstance(rank, int) else Keep(missing=1 - rank)


def _refuse_too_high(keep: Keep, path: str, base: Any) -> None:
    highest = base.groups * min(base.out_features // base.groups, base.in_features)
    if keep.rank is not None and keep.rank > highest:
        raise MergeError(
            f"rank={keep.rank} is more than {path} can have, whose sides are ({base.out_features}, "
            f"{base.in_features}); use at most {highest}, or a share of the squared singular values",
            field="rank",
            path=path,
            found=keep.rank,
            expected=highest,
        )


def _compiled(options: dict[str, Any]) -> Callable[[Tensor], Any]:
    return torch.compile(lambda matrix: torch.linalg.svd(matrix, full_matrices=False), **options)


def _shown(layers: list[Any], progressbar: bool) -> Iterable[Any]:
    if not progressbar:
        return layers
    try:
        from tqdm import tqdm
    except ImportError:
        warn("convert_to_lora: progressbar=True needs tqdm, which is not installed")
        return layers
    return tqdm(layers, desc="Converting to LoRA")


def _warn(errors: dict[str, float], name: str) -> None:
    path, error = max(errors.items(), key=lambda item: item[1])
    if error > LOST_WORTH_SAYING:
        warn(
            f"convert_to_lora: {name!r} loses up to {error:.0%} of its change of a weight (at {path}; `.errors` has "
            "every layer); a higher rank loses less, max_error= finds the rank for a given loss"
        )
