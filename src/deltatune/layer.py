"""`AdaptedLayer`: stands where a layer stood, holds it and any number of named adapters of any methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from deltatune import manners, mixed
from deltatune.adapter import Adapter, Applied, LinearMap
from deltatune.bases import as_map
from deltatune.bases.block import Block, first_tensor, with_first
from deltatune.bases.parallel import ParallelLinear
from deltatune.compat import LayerViews
from deltatune.errors import StateError
from deltatune.live_names import say_names
from deltatune.merging import Merging
from deltatune.selection import Call, Selection, has_scale
from deltatune.weight import LazyWeight


@dataclass(frozen=True, eq=False)
class Standing:
    """A layer under the adapters that are active, kept from call to call until one of all this is another."""

    call: Call
    base: nn.Module
    weight: nn.Parameter
    adapters: dict[str, nn.Module | None]
    layer: LinearMap

    def __reduce__(self) -> Any:
        return type(None), ()  # copies of a model start without

    def holds(self, call: Call, modules: dict[str, Any]) -> bool:
        base, present = modules["base_layer"], modules["adapters"]._modules
        if call is not self.call or base is not self.base or base._parameters.get("weight") is not self.weight:
            return False
        for name, adapter in self.adapters.items():  # noqa: SIM110, as in `mixed.Plan.holds`
            if present.get(name) is not adapter:
                return False
        return True


@dataclass(frozen=True, eq=False)
class Alone:
    """A layer under the one adapter that is active, in the way that this has prepared (`Adapter.prepared`)."""

    call: Call
    base: nn.Module
    name: str
    adapter: Any
    present: Mapping[str, Any]  # those on the layer
    run: Callable[[Tensor], Tensor | None]

    def __reduce__(self) -> Any:
        return type(None), ()


class AdaptedLayer(LayerViews, Merging):
    """A layer, or a block of layers, under adapters.

    Which of them act is decided by `selection`, shared by all layers of the model. To code that reads the layer
    instead of calling it, `weight` and `bias` are the adapted ones, everything else is the base layer's.
    """

    base_layer: nn.Module
    adapters: nn.ModuleDict
    selection: Selection
    plan: mixed.Plan | None  # of the last batch whose rows differed
    standing: Standing | None  # of the last call that chose nothing by itself
    alone: Alone | None  # likewise
    is_block: bool  # whether the layer is a block of layers, which keep the paths they had without it
    is_paired: bool  # whether callers expect more than the output

    def __init__(self, base_layer: nn.Module, selection: Selection) -> None:
        super().__init__()
        self._modules.update(base_layer=base_layer, adapters=nn.ModuleDict())
        seen = as_map(base_layer)
        # past nn.Module's look-ups, of which there would be one for each attribute of hundreds of layers
        vars(self).update(
            selection=selection,
            stash=None,
            plan=None,
            standing=None,
            alone=None,
            is_block=seen is None,
            is_paired=isinstance(seen, ParallelLinear),
            training=base_layer.training,
        )
        self.register_load_state_dict_post_hook(say_names)

    def as_map(
        self,
        names: Iterable[str] = (),
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        read: Callable[[str], Any] = lambda name: None,
    ) -> LinearMap:
        """The base layer under the named adapters; names without an adapter here are passed over.

        Those that change the weight come first, in order, and then in order those that no weight can hold: a changed
        weight stays one, whatever acts on what comes out of the layer.
        """
        layer: Any = Block(self.base_layer) if self.is_block else as_map(self.base_layer, args, kwargs)
        return self._under(layer, names, read)

    def _under(self, layer: LinearMap, names: Iterable[str], read: Callable[[str], Any]) -> LinearMap:
        here: list[Any] = [self.selection.acting(self.adapters[name]) for name in names if name in self.adapters]
        for adapter in [a for a in here if a.mergeable is True] + [a for a in here if a.mergeable is not True]:
            layer = Applied(adapter, layer, read)
        return layer

    def add(self, name: str, adapter: Adapter) -> None:
        mode = self.training or manners.as_peft
        if not (mode and all(module.training for module in adapter.modules())):
            adapter.train(mode)
        if adapter.configured_scaling is None and has_scale(adapter):
            adapter.configured_scaling = adapter.scaling  # type: ignore[assignment]  # before any program changes it
        self.adapters[name] = adapter
        adapter.joins(self.adapters)

    def drop(self, name: str) -> None:
        """Take an adapter off, if it is here."""
        if name in self.adapters:
            del self.adapters[name]
        if self.plan is not None and name in self.plan.held:
            self.plan = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # While decoding the layer's own product takes 40 to 140 microseconds and every object that Python has to look
        # at up to a tenth of one: so first what needs few, past the look-ups of `nn.Module`.
        if len(args) == 1 and type(args[0]) is Tensor and not is_grad_enabled() and not kwargs:
            own = vars(self)
            kept, selection = own["alone"], own["selection"]
            if (
                kept is not None
                and kept.call is selection.standing
                and not selection.choosing
                and own["stash"] is None
                and own["_modules"]["base_layer"] is kept.base
                and kept.present.get(kept.name) is kept.adapter
                and not is_dynamo_compiling()
            ):
                output = kept.run(args[0])
                if output is not None:
                    return output
        if not self.is_paired:
            return self._forward(args, kwargs)
        layer: Any = self.as_map()
        output = self._forward((layer.taken(args[0]), *args[1:]), kwargs)
        return output if isinstance(output, tuple) else layer.paired(output)

    def _forward(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = self.selection.current()
        if self.is_block:
            return self._block_forward(call, args, kwargs)
        x, args = args[0], args[1:]
        if self.stash is not None:
            return self._merged_forward(x, call, args, kwargs)
        if call.rows is not None:
            return self._mixed_forward(x, call, args, kwargs)
        if call is self.selection.standing and not args and not kwargs and not torch.compiler.is_compiling():
            return self._under_active(call)(x)
        return self._adapted_forward(x, call, call.names, args, kwargs)

    def _adapted_forward(
        self, x: Tensor, call: Call, names: Iterable[str], args: tuple, kwargs: dict[str, Any]
    ) -> Tensor:
        batch = x.shape[0] if x.ndim else 1
        return self.as_map(names, args, kwargs, lambda name: call.value(name, batch))(x)

    def _under_active(self, call: Call) -> LinearMap:
        """The layer under the active adapters; putting it together would cost as much as a token through it."""
        kept = self.standing
        if kept is not None and kept.holds(call, self._modules):
            return kept.layer
        layer, base = self.as_map(call.names), self.base_layer
        weight, adapters = base._parameters.get("weight"), self.adapters._modules
        if type(weight) is nn.Parameter and as_map(base).dense:  # type: ignore[union-attr]
            found = {name: adapters.get(name) for name in call.names}
            vars(self).update(standing=Standing(call, base, weight, found, layer), alone=self._alone(call))
        return layer

    def _alone(self, call: Call) -> Alone | None:
        name, present = call.names[0] if len(call.names) == 1 else "", self.adapters._modules
        adapter: Any = present.get(name)  # of several none is alone, even where the others have nothing here
        run = None if adapter is None or self.is_paired else adapter.prepared(self.as_map())
        return None if run is None else Alone(call, self.base_layer, name, adapter, present, run)

    def _mixed_forward(self, x: Tensor, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Row i of the batch through adapter rows[i], or the base where that has nothing here."""
        layer = self.as_map((), args, kwargs)
        if layer.only_weight:
            names = self._one_for_all(call)
            with self.selection.use(Call(names)):  # parts whose weight it reads follow
                return self.as_map(names, args, kwargs)(x)

        return self._by_plan(layer, x, call)

    def _by_plan(self, layer: LinearMap, x: Tensor, call: Call, seen: Tensor | None = None) -> Tensor:
        shown = x if seen is None else seen
        try:
            return mixed.forward(self._plan(call, layer, shown), layer, x, call, seen)
        except mixed.OutdatedPlan:
            self.plan = None
            return mixed.forward(self._plan(call, layer, shown), layer, x, call, seen)

    def _plan(self, call: Call, layer: LinearMap, x: Tensor) -> mixed.Plan:
        """Which rows go together; the last plan is kept, since decoding asks for the same in every step."""
        names, adapters = call.rows_of(len(x)), self.adapters._modules
        if torch.compiler.is_compiling():
            return mixed.Plan.of(names, adapters, layer, x.device)
        plan = self.plan
        if plan is None or not plan.holds(names, adapters, x.device):
            plan = mixed.Plan.of(names, adapters, layer, x.device)
            vars(self)["plan"] = plan
        return plan

    def _block_forward(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The block runs once, as it is; adapters act on what comes out of it."""
        return self._after(self.base_layer(*args, **kwargs), call, args, kwargs)

    def _after(self, output: Any, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What adapters make of the output of a block."""
        if not any(name in self.adapters for name in call.rows or call.names if name):
            return output
        x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
        if call.rows is None:
            layer = self._under(Block(self.base_layer, y), call.names, lambda name: call.value(name, len(y)))
            return with_first(output, layer(x))

        block = Block(self.base_layer, y)
        return with_first(output, self._by_plan(block, x, call, seen=y))

    def _one_for_all(self, call: Call) -> tuple[str, ...]:
        """The adapters whose weight is every row's.

        Raises:
            StateError: Rows differ, and one weight cannot be all of theirs.
        """
        if call.rows is None:
            return call.names
        here = {name if name and name in self.adapters else None for name in call.rows}
        if len(here) > 1:
            raise StateError(
                f"adapter_names: rows cannot differ in a {type(self.base_layer).__name__} whose weight is read instead "
                "of the layer being called; call the model once per adapter",
                field="adapter_names",
                found=call.rows,
            )
        return tuple(name for name in here if name)

    def _merged_forward(self, x: Tensor, call: Call, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Merged adapters are in the weight, active ones that are not act on it; no adapters: on the kept weights."""
        stash = self.stash
        assert stash is not None and stash.weight is not None
        if call.rows is not None:
            raise StateError(
                "adapter_names: rows cannot differ while adapters are merged; call unmerge_adapter() first",
                field="adapter_names",
                found=call.rows,
                hint="call unmerge_adapter()",
            )
        if not call.names:
            layer = as_map(self.base_layer, args, kwargs)
            assert layer is not None
            return layer.apply(x, layer.matrix(stash.weight), stash.bias)
        stash.refuse_stale(self.training)
        rest = self.unmerged(call.names)
        return self._adapted_forward(x, call, rest, args, kwargs) if rest else self.base_layer(x, *args, **kwargs)

    # -------------------------------------------------------------------------------------- for those who read weights

    @property
    def weight(self) -> Tensor:
        return self._seen("weight")

    def _seen(self, name: str) -> Tensor:
        """The adapted matrix under the name that the base layer has for it."""
        stored: Tensor = getattr(self.base_layer, name)
        call = self.selection.current()
        if self.stash is not None and self.stash.weight is not None and not (call.rows or call.names):
            return self.stash.weight
        names = self.unmerged(name for name in call.rows or call.names if name)
        if not names or not stored.is_floating_point():  # packed: no matrix to be read
            return stored

        def compute() -> Tensor:
            return self.stored_weight(self.unmerged(self._one_for_all(call))).to(stored.dtype)

        # Under the compiler an unused matrix is dropped from the graph, and a wrapper would only break it.
        can = all(self.adapters[name].mergeable is True for name in names)
        return compute() if can and torch.compiler.is_compiling() else LazyWeight(stored, compute)

    @property
    def bias(self) -> Tensor | None:
        call = self.selection.current()
        if self.stash is not None and not (call.rows or call.names):
            return self.stash.bias
        return self.as_map(self.unmerged(self._one_for_all(call))).bias

    def stored_weight(self, names: Iterable[str]) -> Tensor:
        """The adapted weight in the base layer's own layout."""
        return self.as_map().store(self.as_map(names).weight)

    # ------------------------------------------------------------------------------------------- like the base layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_modules" not in self.__dict__:  # being copied or unpickled
                raise
        found, view = self.view(name)
        if found:
            return view
        value = getattr(self._modules["base_layer"], name)
        return self._seen(name) if isinstance(value, nn.Parameter) and name == self.as_map().keeps[0] else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):  # tying and resizing write to the layer they think they see
            setattr(self.base_layer, name, value)
        elif name == "training" and "adapters" in self.__dict__.get("_modules", {}):  # they are none of `modules()`
            super().__setattr__(name, value)
            self.adapters.train(value)
        else:
            super().__setattr__(name, value)
