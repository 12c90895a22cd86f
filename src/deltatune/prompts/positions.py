"""PEFT's layout: its prefix is a stretch of cache, so that P tokens seem to stand before the first one.

Three things follow from that, beside the order of layers in encoder-decoders (`deltatune.prompts.prefix`):

- every position moves by P, where rotary angles are made and where learned positions are looked up (`PositionShift`);
- a relative bias (T5) also holds between a query and the prefix, as far away as it stands in the cache (`Past.bias`);
- a sliding window slides out of the prefix (`deltatune.prompts.masks`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltatune.errors import TargetError
from deltatune.patterns import modules_by_name


class Shifting(Protocol):
    """Says by how much positions move in the pass that is running."""

    def shift(self) -> int: ...


@dataclass
class Past:
    """Where the queries of a call stand in PEFT's cache.

    Attributes:
        seen: Tokens that the cache of the model held before this forward pass.
        biased: The module whose table the relative position bias of this site comes from; None without such a bias.
    """

    seen: int | Tensor
    biased: Any = None

    def positions(self, query: Tensor, count: int) -> Tensor:
        return torch.arange(query.shape[2], device=query.device) + self.seen + count

    def bias(self, module: nn.Module, query: Tensor, count: int) -> Tensor:
        if self.biased is None:
            raise TargetError(
                f"{type(module).__name__}: its position bias cannot be computed for PEFT's layout; use layout='native'",
                field="layout",
            )
        bias = self.biased.compute_bias(query.shape[2], count, device=query.device, past_seen_tokens=self.seen + count)
        return bias.to(query.dtype)


class PositionShift:
    """Moves the positions of a model by what the stage says, while hooks of this object are on its modules."""

    def __init__(self, stage: Shifting, rotary_only: bool = False) -> None:
        self.stage = stage
        self.rotary_only = rotary_only
        self.handles: list[Any] = []

    def attach(self, model: nn.Module, site_names: list[str]) -> None:
        entering = _where_positions_enter(model, site_names)
        for _, module in entering if self.rotary_only else position_modules(model, site_names):
            if _is_rotary(module) or not self.rotary_only:
                hook = self.before_positions if _position_arguments(module) else self.before_lookup
                self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def before_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Move the positions that a module is told; where it is told none, the number of tokens before the first."""
        shift = self.stage.shift()
        if not shift:
            return args, kwargs
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        name = next((name for name in _position_arguments(module) if given.get(name) is not None), None)
        if name is None:
            return args, {**kwargs, _position_arguments(module)[-1]: shift}
        if name in kwargs:
            return args, {**kwargs, name: _moved(kwargs[name], shift)}
        index = list(given).index(name) - 1
        return (*args[:index], _moved(args[index], shift), *args[index + 1 :]), kwargs

    def before_lookup(self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Look up row i + P instead of i; the row of padding stays (RoBERTa counts from it)."""
        shift = self.stage.shift()
        if not shift:
            return args, kwargs
        rows = args[0] if args else kwargs["input"]
        moved = rows + shift
        if module.padding_idx is not None:
            moved = torch.where(rows == module.padding_idx, rows, moved)
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "input": moved})


def _moved(positions: Any, shift: int) -> Any:
    """Positions moved on; a negative one (OPT's for padding) is none, and stays."""
    if isinstance(positions, Tensor):
        return torch.where(positions < 0, positions, positions + shift)
    return positions + shift


def position_modules(model: nn.Module, site_names: list[str]) -> list[tuple[str, nn.Module]]:
    """The modules through which positions enter the part of a model that holds the sites.

    Raises TargetError where they enter in a way that PEFT's shift is not known for.
    """
    found = list(_where_positions_enter(model, site_names))
    for name, module in found:
        if not isinstance(module, nn.Embedding) and not _position_arguments(module):
            raise TargetError(
                f"{type(model).__name__}: PEFT's layout is not available, because its positions come from "
                f"{type(module).__name__} at {name!r}; use layout='native'",
                field="layout",
                found="peft",
                expected="native",
            )
    return found


def learned_tables(model: nn.Module, site_names: list[str]) -> list[nn.Embedding]:
    """The tables in which the part of a model that holds the sites looks positions up."""
    return [module for _, module in _where_positions_enter(model, site_names) if isinstance(module, nn.Embedding)]


def counting_modules(model: nn.Module, site_names: list[str]) -> list[nn.Module]:
    """The modules that make rotary angles from positions, in the part of a model that holds the sites.

    Where positions enter through no module, the attentions that are given them (GPT-J and CodeGen).
    """
    entering = [module for _, module in _where_positions_enter(model, site_names)]
    counting = [module for module in entering if _is_rotary(module)]
    if not entering:
        counting = [module for name, module in modules_by_name(model).items() if name in site_names]
    return [module for module in counting if "position_ids" in _position_arguments(module)]


def _is_rotary(module: nn.Module) -> bool:
    return "rotary" in type(module).__name__.lower()


def _position_arguments(module: nn.Module) -> list[str]:
    """The arguments of a module's forward that tell it where the tokens stand, the one that decides first."""
    accepted = inspect.signature(type(module).forward).parameters  # what is put around a module's own may not say
    return [name for name in ("position_ids", "past_key_values_length") if name in accepted]


def _where_positions_enter(model: nn.Module, site_names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """In the smallest model within the model that holds all sites: not in the vision tower beside a language model."""
    from transformers import PreTrainedModel

    homes = [
        (name, module)
        for name, module in modules_by_name(model).items()
        if isinstance(module, PreTrainedModel)
        and all(f"{site}.".startswith(f"{name}." if name else "") for site in site_names)
    ]
    home_name, home = max(homes, key=lambda entry: len(entry[0]))
    for name, module in home.named_modules(prefix=home_name):
        last = name.rpartition(".")[2]
        learned = isinstance(module, nn.Embedding) and ("pos" in last or last == "wpe")
        sinusoidal = "Positional" in type(module).__name__
        if _is_rotary(module) or learned or sinusoidal:
            yield name, module
