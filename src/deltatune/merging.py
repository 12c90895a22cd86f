"""Adapters computed into the parameters of their layer, and the parameters that were there put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.adapter import LinearMap
from deltatune.bases.packed import PackedLinear
from deltatune.bases.parameter import is_finite, like, offloading
from deltatune.errors import MergeError, StateError
from deltatune.selection import Selection


@dataclass
class Merged:
    """Adapters whose change is in the base layer now, and the parameters that were there before.

    Attributes:
        lost: What rounding to the layer's precision changed, as a share of the update: |held - W'| / |W' - W|.
        merged_at: The parameters of the adapters, with the versions that are merged.
    """

    names: tuple[str, ...]
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    lost: float = 0.0
    merged_at: tuple[tuple[nn.Parameter, int], ...] = ()

    def by_name(self, keeps: tuple[str, str]) -> dict[str, nn.Parameter | None]:
        """Parameters by their names in a layer that calls its two so."""
        return dict(zip(keeps, (self.weight, self.bias)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.merged_at = tuple(
            (parameter, parameter._version) for parameter, _ in self.merged_at
        )  # a copy's count anew

    def refuse_stale(self, training: bool) -> None:
        """Before a pass on them: steps that look like training leave the merged weights as they are.

        Raises:
            StateError: The adapters have changed since they were merged, or are to be trained.
        """
        if torch.compiler.is_compiling():
            return
        if any(parameter._version != version for parameter, version in self.merged_at):
            what = "have changed since they were merged; call unmerge_adapter(), and merge_adapter() again"
        elif training and torch.is_grad_enabled() and any(parameter.requires_grad for parameter, _ in self.merged_at):
            what = "are merged, so no gradient reaches them; call unmerge_adapter() before training"
        else:
            return
        names = list(self.names)
        raise StateError(f"adapters {names} {what}", field="adapter_name", found=names)


class Merging(nn.Module):
    """What an `AdaptedLayer` does about merging.

    Attributes:
        stash: The parameters of the base layer while others are in their place; None while none are.
    """

    base_layer: nn.Module
    adapters: nn.ModuleDict
    selection: Selection
    stash: Merged | None

    def as_map(self, names: Iterable[str] = ()) -> LinearMap:
        """The base layer under the named adapters."""
        raise NotImplementedError

    def merged_parameters(self, names: Iterable[str], check: bool) -> Merged:
        """What the base layer's parameters become; changes nothing.

        Raises:
            MergeError: The layer cannot hold the result, or (with `check`) it is not finite.
        """
        names = tuple(name for name in names if name in self.adapters)
        base, acting = self.as_map(), [self.adapters[name] for name in names]
        old_weight, old_bias = self._kept(base)
        if hasattr(old_weight, "_local_tensor") or hasattr(old_weight, "ds_id"):  # of FSDP2, of ZeRO-3
            raise MergeError(
                f"the weight of this {type(self.base_layer).__name__} is in shards, of which this process has one; "
                "save the adapter, and merge it into a base that one process has loaded whole",
                found="sharded",
            )
        if offloading(self.base_layer) is not None:
            raise MergeError(
                f"the weight of this {type(self.base_layer).__name__} is kept in host memory or on disk (device_map), "
                "from where it would come back unmerged; merge into a base that is loaded without offloading",
                found="offloaded",
            )
        if any(tensor.is_meta for module in (self.base_layer, *acting) for tensor in _held(module)):
            raise MergeError(
                f"tensors of this {type(self.base_layer).__name__} or of {list(names)} are on the meta device and have "
                "no numbers; load them first (PeftModel.from_pretrained, or set_peft_model_state_dict)",
                found="meta",
            )
        with in_eval_mode([self.base_layer, *acting]), torch.no_grad():
            bias = self.as_map(names).bias
            plain = weight = base.weight
            for name in names:
                weight = self.selection.acting(self.adapters[name]).adapt(weight)
            # what no adapter changed is kept as it is, and needs no packing again
            held = old_weight if weight is plain and old_weight is not None else base.hold(weight)
        refuse_infinite(names, base, (weight, held, bias), check)
        if bias is not None and old_bias is None:  # a bias that the architecture lacks would be lost by its files
            raise MergeError(
                f"{type(self.base_layer).__name__} without bias cannot hold the bias of {list(names)}",
                field="bias",
                found=list(names),
                expected="a layer with a bias",
            )
        assert old_weight is not None
        like_old = old_weight if old_bias is None else old_bias
        new_bias = None if bias is None else like(bias, like_old)
        return Merged(names, held, new_bias, lost(base, weight, held), self._versions(names))

    def _versions(self, names: Iterable[str]) -> tuple[tuple[nn.Parameter, int], ...]:
        parameters = [parameter for name in names for parameter in self.adapters[name].parameters()]
        return tuple((parameter, parameter._version) for parameter in parameters)

    def more_merged(self, names: Iterable[str], check: bool) -> Merged:
        """The same with the named adapters beside those that are merged already, from the parameters that were kept."""
        before = self.stash
        if before is None:
            return self.merged_parameters(names, check)
        now = self._present(before)
        self.unmerge()
        try:
            return self.merged_parameters((*before.names, *names), check)
        finally:
            self._put(now)
            self.stash = before

    def swap_in(self, new: Merged) -> None:
        """Put new parameters in place of the base layer's and keep those, object for object, for `unmerge`."""
        self.unmerge()
        old = self._present(new)
        self._put(new)
        self.stash = old

    def _present(self, like: Merged) -> Merged:
        """What is in the places now that `like` fills."""
        weight, bias = self._kept(self.as_map())
        assert weight is not None
        return Merged(like.names, weight, bias, merged_at=like.merged_at)

    def unmerge(self) -> None:
        if self.stash is not None:
            self._put(self.stash)
            self.stash = None

    def _kept(self, base: LinearMap) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        weight, bias = base.keeps
        return getattr(self.base_layer, weight, None), getattr(self.base_layer, bias, None)

    def _put(self, new: Merged) -> None:
        """The parameter objects themselves change places, so a tied layer elsewhere keeps what it had."""
        assert new.weight is not None
        base = self.as_map()
        weight, bias = base.keeps
        if isinstance(base, PackedLinear):
            return base.put(new.weight, new.bias)
        setattr(self.base_layer, weight, new.weight)
        if bias in self.base_layer._parameters:
            self.base_layer.register_parameter(bias, new.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Merging:
        """Moved or cast: the kept parameters too, which `unmerge` puts back."""
        super()._apply(fn, recurse)
        for kept in () if self.stash is None else self.stash.by_name(("weight", "bias")).values():
            if kept is not None:
                with torch.no_grad():
                    kept.data = fn(kept.data)
        return self


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules and what is in them out of training mode, within the block; then each in the mode it was in.

    Of most merges none is in training mode, and none is touched.
    """
    training = [part for module in modules if module.training for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _held(module: Any) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@torch.no_grad()
def lost(base: LinearMap, weight: Tensor, held: nn.Parameter) -> float:
    if weight.dtype == held.dtype and type(held) is nn.Parameter:  # others may say so and hold codes
        return 0.0
    missed, update = (base.matrix(held) - weight).norm(), (weight - base.weight).norm()
    return (missed / update).item() if update > 0 else 0.0


def refuse_infinite(names: Iterable[str], base: LinearMap, new: Iterable[Tensor | None], check: bool) -> None:
    """
    Args:
        new: What is to be merged, before and after rounding to the layer's precision.
        check: Also where the base has such values already.
    """
    plain = [part for part in new if type(part) in (Tensor, nn.Parameter)]  # others hold codes
    parts = [part.detach() for part in plain if part.is_floating_point()]  # type: ignore[union-attr]
    if all(is_finite(part) for part in parts) or not (check or is_finite(base.weight)):
        return
    largest = max(part.abs().max().item() for part in parts)
    raise MergeError(
        f"the merged weight is not finite (largest value {largest}); adapters {list(names)} are broken, or too large "
        f"for {base.dtype}",
        found=list(names),
    )
