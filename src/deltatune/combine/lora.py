"""A LoRA adapter from the changes that it is to hold: its config, its tensors, and how it comes onto a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import inject
from deltatune.combine import naming
from deltatune.combine.changes import Change
from deltatune.combine.product import Keep, Matrix, Product, distance, norm, truncated
from deltatune.config import PeftConfig
from deltatune.errors import MergeError
from deltatune.lora.config import LoraConfig
from deltatune.methods.lora import LoRA


@dataclass(frozen=True)
class Factors:
    """What one LoRA layer holds: a product for each group of its outputs, all of one rank, and a bias.

    Attributes:
        error: |held - wanted| / |wanted|, of the weight.
    """

    groups: tuple[Product, ...]
    bias: Tensor | None = None
    error: float = 0.0

    @property
    def rank(self) -> int:
        return self.groups[0].rank * len(self.groups)

    def padded(self, rank: int) -> Factors:
        """The same of a higher rank."""
        return replace(self, groups=tuple(part.padded(rank // len(self.groups)) for part in self.groups))

    def fill(self, adapter: LoRA) -> None:
        """Put them into a LoRA adapter of this rank, whatever its scaling."""
        A, B = adapter.lora_A.weight, adapter.lora_B.weight
        A.data.copy_(torch.cat([part.down for part in self.groups]).view_as(A))
        B.data.copy_(torch.cat([part.up for part in self.groups]).view_as(B) / adapter.scaling)
        if adapter.lora_B.bias is not None:
            bias = torch.zeros(()) if self.bias is None else self.bias / adapter.bias_scaling
            adapter.lora_B.bias.data.copy_(bias.expand_as(adapter.lora_B.bias))


def factors(matrix: Matrix, like: Change, keep: Keep, bias: Tensor | None, **options: Any) -> Factors:
    """The nearest factors that `keep` allows, in the adapter's precision, and how near they are."""
    parts = pieces(matrix, like.groups)
    found = [truncated(part, _of_group(keep, like.groups), **options).to(like.dtype) for part in parts]
    return _with_error(parts, found, bias)


def stacked(matrix: Matrix, like: Change, bias: Tensor | None) -> Factors:
    """The matrix itself: its own factors if it has some, and all its singular vectors otherwise."""
    parts, found = pieces(matrix, like.groups), []
    for part in parts:
        side = min(part.up.shape[0], part.down.shape[1]) if isinstance(part, Product) else 0
        plain = isinstance(part, Product) and 0 < part.rank <= side
        found.append(part if plain else truncated(part, Keep()))  # more factors than rows have a product of fewer
    return _with_error(parts, [part.to(like.dtype) for part in found], bias)  # type: ignore[union-attr]


def pieces(matrix: Matrix, groups: int) -> list[Matrix]:
    """The rows of each group of a convolution."""
    if groups == 1:
        return [matrix]
    if isinstance(matrix, Product):
        step = len(matrix.up) // groups
        return [matrix.rows(start, start + step) for start in range(0, len(matrix.up), step)]
    return list(matrix.chunk(groups))


def _of_group(keep: Keep, groups: int) -> Keep:
    if keep.rank is None or groups == 1:
        return keep
    if keep.rank % groups:
        raise MergeError(
            f"rank {keep.rank} does not divide by the {groups} groups of a convolution; use a multiple of {groups}",
            field="rank",
            found=keep.rank,
            expected=groups,
        )
    return Keep(keep.rank // groups)


def _with_error(wanted: Sequence[Matrix], found: Sequence[Product], bias: Tensor | None) -> Factors:
    rank = max(part.rank for part in found)
    size = sum(norm(part) ** 2 for part in wanted)
    missed = sum(distance(part, got) ** 2 for part, got in zip(wanted, found))
    return Factors(tuple(part.padded(rank) for part in found), bias, (missed / size) ** 0.5 if size else 0.0)


def of_one_rank(model: nn.Module, layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """An attention and its parts brought to the higher of their ranks: in a config they have one."""
    found = dict(layers)
    for held in _parts(model):
        mine = [one for one in held if one in found]
        rank = max((found[one].rank for one in mine), default=0)
        found |= {one: found[one].padded(rank) for one in mine}
    return found


def _parts(model: nn.Module) -> list[list[str]]:
    """Layers that are adapted together: the path of an attention, and those of its parts."""
    held = ((path, layer.as_map().parts) for path, layer in inject.adapted_layers(model))
    return [[path, *(f"{path}.base_layer.{part}" for part in parts)] for path, parts in held if parts]


def config_for(model: nn.Module, layers: Mapping[str, Factors], like: PeftConfig | None = None) -> LoraConfig:
    """The config of LoRA on exactly these layers, with scaling one.

    Raises:
        MergeError: A bias has to be held for an embedding.
    """
    bias = any(layer.bias is not None for layer in layers.values())
    parts = {part for held in _parts(model) for part in held[1:] if held[0] in layers}
    named = {path: layer for path, layer in layers.items() if path not in parts}  # parts go with what they are in
    if bias:
        _refuse_embeddings(model, layers)
    rank, ranks = naming.by_layer({path: layer.rank for path, layer in named.items()})
    kept = ("task_type", "base_model_name_or_path", "revision", "lora_dropout")
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=naming.targets(model, list(named)),
        lora_bias=bias,
        **{name: getattr(like, name) for name in kept if hasattr(like, name)},
    )


def _refuse_embeddings(model: nn.Module, layers: Mapping[str, Factors]) -> None:
    holding = {path: layer.as_map() for path, layer in inject.adapted_layers(model) if path in layers}
    embedding = next((path for path, base in holding.items() if base.kind == "embedding"), None)
    changed = next(path for path, layer in layers.items() if layer.bias is not None)
    if embedding is not None:
        raise MergeError(
            f"the bias of {changed} changes, for which LoRA needs lora_bias=True, and files have no name for the bias "
            f"of the embedding {embedding}, which is adapted too; leave one of the two out of the adapter",
            field="lora_bias",
            path=changed,
        )


@dataclass
class Copies:
    """The trained copies of whole modules that the new adapter takes over, by path, and how configs call them."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    usual: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, configs: Mapping[str, Any]) -> Copies:
        """Those of the named adapters.

        Raises:
            MergeError: Two adapters have different copies of one module: copies are no changes that could be added.
        """
        found = cls(usual=[name for config in configs.values() for name in config.modules_to_save or ()])
        for path, copies in inject.trained_copies(model):
            own = [name for name in configs if name in copies.modules_to_save]
            if any(not _equal(copies.modules_to_save[own[0]], copies.modules_to_save[name]) for name in own[1:]):
                raise MergeError(
                    f"adapters: {', '.join(map(repr, own))} have a trained copy of {path!r} each (modules_to_save), "
                    "which cannot be combined; only one of them may have one, or all the same",
                    field="adapters",
                    path=path,
                    found=own,
                )
            if own:
                found.modules[path] = copies.modules_to_save[own[0]]
        return found

    def names(self, model: nn.Module) -> list[str] | None:
        return naming.whole(model, list(self.modules), self.usual)

    def fill(self, model: nn.Module, name: str) -> None:
        for path, copies in inject.trained_copies(model):
            if path in self.modules and name in copies.modules_to_save:
                copies.modules_to_save[name].load_state_dict(self.modules[path].state_dict())


def _equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def tensors(
    model: nn.Module, config: LoraConfig, layers: Mapping[str, Factors], copies: Copies, root: str
) -> dict[str, Tensor]:
    """What the file of such an adapter holds; the model is only looked at."""
    found = {}
    maps = {path: layer.as_map() for path, layer in inject.adapted_layers(model) if path in layers}
    config = LoRA.plan(maps, config)
    for path, base in maps.items():
        adapter: Any = LoRA.build(base, config, path).to(layers[path].groups[0].up.dtype)
        layers[path].fill(adapter)
        found |= {f"{root}{path}.{name}": tensor.detach() for name, tensor in adapter.file_tensors().items()}
    for path, module in copies.modules.items():
        found |= {f"{root}{path}.{name}": copy.copy(tensor) for name, tensor in module.state_dict().items()}
    return found


def add(model: Any, name: str, config: PeftConfig, fill: Any, copies: Copies) -> None:
    """Graft an adapter that does not train and fill it; if that fails, the model is as it was."""
    base = model.get_base_model()
    config.modules_to_save = copies.names(base)  # type: ignore[attr-defined]
    with model._changing(name, config):
        model.add_adapter(name, config)
        try:
            with torch.no_grad():
                for path, layer in inject.adapted_layers(base):
                    if name in layer.adapters:
                        fill(path, layer.adapters[name])
                copies.fill(base, name)
        except BaseException:
            model.delete_adapter(name)
            raise
