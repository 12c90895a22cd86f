"""A block of layers, an attention or a whole transformer layer: no weight, but an input and an output of some width.

What is adapted is its output, the first tensor of what it returns. Adapters are shown a block that has run already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bases.linear import Linear
from deltatune.errors import ConfigError, MergeError, StateError

_WIDTHS = ("hidden_size", "embed_dim", "d_model", "n_embd", "dim")


class Block(Linear):
    """Seen by adapters as a linear layer of equal sides whose weight cannot be had."""

    dense: bool = False

    kind = "block"
    types = ()

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return next(module.children(), None) is not None and not isinstance(module, (nn.ModuleList, nn.ModuleDict))

    def __init__(self, module: nn.Module, y: Tensor | None = None, width: int = 0) -> None:
        self.module, self.y = module, y  # type: ignore[assignment]
        self.in_features = self.out_features = width

    @property
    def dtype(self) -> Any:
        return next(parameter.dtype for parameter in self.module.parameters() if parameter.is_floating_point())

    @property
    def weight(self) -> Tensor:
        raise MergeError(
            f"a {type(self.module).__name__} is a block of layers, which has no weight of its own",
            found=type(self.module).__name__,
            expected="a layer with a weight",
        )

    @property
    def bias(self) -> Tensor | None:
        return None

    def __call__(self, x: Any) -> Tensor:
        assert self.y is not None  # it has run
        return self.y

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[-1] != weight.shape[-1]:
            raise StateError(
                f"the input of {type(self.module).__name__} has width {x.shape[-1]}, not {weight.shape[-1]}; "
                "target a module whose input is as wide as its output",
                field="target_modules",
                found=x.shape[-1],
                expected=weight.shape[-1],
            )
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def width_of(model: nn.Module, path: str) -> int:
    """Width of the output of the block at a path: its own word for it, or that of the model that it is a part of."""
    around = [model]
    for part in path.split("."):
        found = getattr(around[-1], part)
        around.append(getattr(found, "base_layer", found))  # it may be adapted already
    own = next((v for v in (getattr(around[-1], name, None) for name in _WIDTHS) if isinstance(v, int)), None)
    if own is not None:
        return own
    for module in reversed(around):
        config: Any = getattr(module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if isinstance(getattr(text, "hidden_size", None), int):
            return text.hidden_size
    for module in reversed([around[-1], *_inside(around[-1])]):
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
        if isinstance(module, nn.Linear):
            return module.out_features
    raise ConfigError(
        f"target {path!r}: the width of a {type(around[-1]).__name__} cannot be told; give it an attribute hidden_size",
        field="target_modules",
        path=path,
    )


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a block, without those that adapters have brought."""
    for name, child in module._modules.items():
        if child is not None and name != "adapters":
            yield child
            yield from _inside(child)


def first_tensor(values: Any) -> Tensor:
    """The hidden states among the arguments of a block, or in what it returns."""
    if isinstance(values, Tensor):
        return values
    parts = values.values() if isinstance(values, Mapping) else values
    found = next((part for part in parts if isinstance(part, Tensor)), None)
    if found is None:
        raise StateError(
            "a block whose output is to be adapted takes and returns no tensor; target a layer in it",
            field="target_modules",
            found=type(values).__name__,
            expected="a tensor",
        )
    return found


def with_first(output: Any, new: Tensor) -> Any:
    """What a block returns, with another first tensor."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        key = next(key for key, part in output.items() if isinstance(part, Tensor))
        return type(output)(**{**output, key: new}) if hasattr(output, "to_tuple") else {**output, key: new}
    index = next(i for i, part in enumerate(output) if isinstance(part, Tensor))
    return type(output)((*output[:index], new, *output[index + 1 :]))
