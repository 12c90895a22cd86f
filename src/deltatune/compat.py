"""What programs written for PEFT read, set and call on an adapted layer, over the data where it really is.

Nothing in deltatune uses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltatune.bases import as_map
from deltatune.bases.packed import PackedLinear
from deltatune.errors import AdapterNameError, ConfigError, StateError
from deltatune.live_names import LiveNames
from deltatune.selection import each_once


class ByAdapter(dict):
    """One attribute of every adapter on a layer; what is assigned here is assigned there."""

    def __init__(self, adapters: dict[str, nn.Module], name: str) -> None:
        super().__init__({key: getattr(adapter, name) for key, adapter in adapters.items()})
        self.adapters, self.name = adapters, name

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.adapters:
            raise AdapterNameError(
                f"{key}: no such adapter on this layer, which has {list(self.adapters)}",
                field="adapter_name",
                found=key,
                expected=list(self.adapters),
            )
        held = getattr(self.adapters[key], self.name)
        if isinstance(held, Tensor) and not isinstance(value, Tensor):
            held.fill_(value)  # for compiled models that an adapter may be swapped in
        else:
            setattr(self.adapters[key], self.name, value)
        super().__setitem__(key, getattr(self.adapters[key], self.name))

    def update(self, values: Any) -> None:  # type: ignore[override]
        for key, value in dict(values).items():
            self[key] = value


class Switches:
    """Which adapters are active and train, asked and set on one module; the answer is the whole model's."""

    @property
    def active_adapters(self: Any) -> list[str]:
        return list(self.selection.active)

    @property
    def active_adapter(self: Any) -> list[str]:
        return list(self.selection.active)

    @property
    def disable_adapters(self: Any) -> bool:
        return not self.selection.enabled

    def set_adapter(self: Any, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        names = (adapter_names,) if isinstance(adapter_names, str) else each_once(adapter_names)
        self.selection.active = names
        self.selection.trained = frozenset() if inference_mode else frozenset(names)
        for name, module in self._held().items():
            module.requires_grad_(name in names and not inference_mode)

    def enable_adapters(self: Any, enabled: bool) -> None:
        self.selection.enabled = enabled
        self.selection.trained = frozenset(self.selection.active if enabled else ())
        for name, module in self._held().items():
            module.requires_grad_(enabled and name in self.selection.active)

    def set_requires_grad(self: Any, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        trained = self.selection.trained
        self.selection.trained = trained.union(names) if requires_grad else trained.difference(names)
        for name in names:
            if name in self._held():
                self._held()[name].requires_grad_(requires_grad)

    def delete_adapter(self: Any, adapter_name: str, new_active_adapters: Any = None) -> None:
        """Take the adapter off this module alone; `PeftModel.delete_adapter` takes it off the model."""
        if adapter_name in self._held():
            self._held().pop(adapter_name)
        left = tuple(name for name in self.selection.active if name != adapter_name)
        self.set_adapter(left or sorted(self._held())[:1] or self.selection.active[:0])

    def _get_available_adapters(self: Any) -> set[str]:
        return set(self._held())

    def _all_available_adapter_names(self: Any) -> list[str]:
        return sorted(self._held())


class CopyViews(Switches):
    """PEFT's verbs of a module that is trained whole, beside its original."""

    def _held(self: Any) -> nn.ModuleDict:
        return self._modules["modules_to_save"]

    def adapter_state_dict(self: Any, adapter_name: str, state_dict: dict[str, Any] | None = None) -> dict[str, Any]:
        """The tensors of one copy under the names of the original."""
        return {} if adapter_name not in self._held() else self._held()[adapter_name].state_dict()

    def adapter_state_dict_load_map(self: Any, adapter_name: str) -> dict[str, str]:
        """The names of a copy's tensors in a file -> in this module."""
        return {name: f"modules_to_save.{adapter_name}.{name}" for name in self.adapter_state_dict(adapter_name)}


@dataclass(frozen=True)
class QuantizationBackend:
    """What PEFT's layers say of a quantised base layer."""

    backend_name: str
    supports_merge: bool


class LayerViews(Switches, LiveNames):
    """PEFT's attributes of a tuner layer: `layer.lora_A["default"].weight`, `layer.scaling`, `layer.merged`, ..."""

    def view(self: Any, name: str) -> tuple[bool, Any]:
        """What adapters of this layer have under a name, by adapter; whether any has."""
        holders = {key: adapter for key, adapter in self._modules["adapters"].items() if _knows(adapter, name)}
        if not holders:
            return False, None
        named = self.named(name)
        if named is not None:
            return True, named
        filled = {key: adapter for key, adapter in holders.items() if getattr(adapter, name) is not None}
        filled = {key: adapter for key, adapter in filled.items() if name not in adapter._modules}  # has another name
        return True, ByAdapter(filled, name)

    def _held(self: Any) -> nn.ModuleDict:
        return self._modules["adapters"]

    @property
    def adapter_layer_names(self: Any) -> tuple[str, ...]:
        """Those of PEFT's layer classes, of which some may be empty; of other methods, what they hold."""
        from deltatune.peer.kinds import tensor_names

        tensors, parts = self._named()
        return tuple(dict.fromkeys(tensor_names(self) or (*tensors, *parts)))

    @property
    def other_param_names(self: Any) -> tuple[str, ...]:
        names = self.adapter_layer_names
        held = [(name, adapter) for adapter in self._modules["adapters"].values() for name in adapter.views]
        return tuple(dict.fromkeys(n for n, a in held if n not in names and getattr(a, n) is not None))

    @property
    def is_feedforward(self: Any) -> bool:
        """Of (IA)^3: whether it is the input that is scaled; the same for all adapters of a layer in PEFT."""
        own = [vars(adapter.core) for adapter in self._modules["adapters"].values()]
        held = [values["is_feedforward"] for values in own if "is_feedforward" in values]
        if not held:
            raise AttributeError("is_feedforward: no adapter on this layer scales inputs or outputs")
        return held[0]

    def update_layer(self: Any, adapter_name: str, *sizes: Any, config: Any = None, **options: Any) -> None:
        """An adapter more on this layer alone: `deltatune.peer.update`."""
        from deltatune.peer.update import update_layer

        update_layer(self, adapter_name, *sizes, config=config, **options)

    def get_base_layer(self: Any) -> nn.Module:
        return self.base_layer

    @property
    def quantization_backend(self: Any) -> QuantizationBackend | None:
        """None for a layer that keeps its weight as it is."""
        layer = as_map(self.base_layer)
        return QuantizationBackend(layer.scheme, layer.can_pack) if isinstance(layer, PackedLinear) else None

    def get_base_weight(self: Any) -> Tensor:
        """The frozen weight, dense, in the layout of the base layer."""
        return self.stored_weight([]).detach()

    def set_base_weight(self: Any, weight_data: Tensor) -> None:
        self.base_layer.weight.data = weight_data

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """W' - W of one adapter, in the layout of the base layer."""
        if adapter not in self._modules["adapters"]:
            held = list(self._modules["adapters"])
            raise AdapterNameError(f"no adapter named {adapter!r} on this layer, which has {held}", found=adapter)
        return self.stored_weight([adapter]) - self.stored_weight([])

    def adapter_state_dict_load_map(self: Any, adapter_name: str) -> dict[str, str]:
        """The names of one adapter's tensors in a file -> in this layer."""
        if adapter_name not in self._held():
            return {}
        adapter = self._held()[adapter_name]
        files = {id(tensor): name for name, tensor in adapter.file_tensors().items()}
        own = {f"adapters.{adapter_name}.{name}": files.get(id(p)) for name, p in adapter.named_parameters()}
        return {file: name for key, name in self._names("").items() if (file := own.get(key)) is not None}

    # ------------------------------------------------------------------------------------------------------- scaling

    def set_scale(self: Any, adapter: str, scale: float) -> None:
        """`scale` times the configured scaling; an adapter that is not on this layer is passed over."""
        if adapter in self._modules["adapters"] and "scaling" in self._modules["adapters"][adapter].views:
            self.scaling[adapter] = scale * self._configured(adapter)

    def scale_layer(self: Any, scale: float) -> None:
        """The active adapters' scaling, times `scale`."""
        for name in self._scaled() if scale != 1 else ():
            self.scaling[name] *= scale

    def unscale_layer(self: Any, scale: float | None = None) -> None:
        """The active adapters' scaling divided by `scale`, or what their configs ask for."""
        if scale == 0:
            raise ConfigError(
                "unscale_layer: scale=0 cannot be divided by; leave it out to go back to the config's scale",
                field="scale",
                found=scale,
            )
        for name in self._scaled():
            self.scaling[name] = self._configured(name) if scale is None else self.scaling[name] / scale

    def _scaled(self: Any) -> list[str]:
        held = self._modules["adapters"]
        return [name for name in self.selection.active if name in held and "scaling" in held[name].views]

    def _configured(self: Any, name: str) -> float:
        adapter = self._modules["adapters"][name]
        if adapter.configured_scaling is None:
            raise StateError(
                f"{type(adapter).__name__} has no scaling that could be set (adapter {name!r})", found=name
            )
        return adapter.configured_scaling

    # ------------------------------------------------------------------------------------------------------- merging

    @property
    def merged(self: Any) -> bool:
        return self.stash is not None

    @property
    def merged_adapters(self: Any) -> list[str]:
        return [] if self.stash is None else list(self.stash.names)

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the named adapters (the active ones) into this layer's weight, beside those that are in it already."""
        new = self.unmerged(self.selection.active if adapter_names is None else adapter_names)
        if new:
            self.swap_in(self.more_merged(new, safe_merge))

    def unmerged(self: Any, names: Iterable[str]) -> list[str]:
        """Those of the names that have an adapter here which is not merged."""
        return [name for name in names if name in self._modules["adapters"] and name not in self.merged_adapters]

    def supports_lora_conversion(self: Any, adapter_name: str = "default") -> bool:
        from deltatune.combine.changes import obstacle

        return adapter_name in self.adapters and obstacle(self, adapter_name) is None


def _knows(adapter: Any, name: str) -> bool:
    return name in adapter.views or name in adapter._modules or name in adapter._parameters or name in adapter._buffers
