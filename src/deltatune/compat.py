"""Views that programs written for PEFT expect on an adapted layer, over the data where it really is.

Nothing in deltatune uses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from deltatune.layer import AdaptedLayer


class LayerViews:
    """PEFT's attributes of a tuner layer: `layer.lora_A["default"].weight`, `layer.scaling`, `layer.merged`, ..."""

    def view(self: Any, name: str) -> tuple[bool, Any]:
        """The per-adapter dict called `name`, if an adapter of this layer has such an attribute."""
        holders = {key: adapter for key, adapter in self._modules["adapters"].items() if name in adapter.views}
        values = {key: getattr(adapter, name) for key, adapter in holders.items()}
        values = {key: value for key, value in values.items() if value is not None}
        return bool(holders), values

    @property
    def merged(self: Any) -> bool:
        return self.stash is not None

    @property
    def merged_adapters(self: Any) -> list[str]:
        return [] if self.stash is None else list(self.stash.names)

    @property
    def active_adapters(self: Any) -> list[str]:
        return list(self.selection.active)

    @property
    def active_adapter(self: Any) -> list[str]:
        return list(self.selection.active)

    @property
    def disable_adapters(self: Any) -> bool:
        return not self.selection.enabled

    def get_base_layer(self: Any) -> nn.Module:
        return self.base_layer

    def get_delta_weight(self: AdaptedLayer | Any, adapter: str) -> Tensor:
        """W' - W of one adapter, in the layout of the base layer."""
        return self.stored_weight([adapter]) - self.stored_weight([])

    def supports_lora_conversion(self: AdaptedLayer | Any, adapter_name: str = "default") -> bool:
        from deltatune.combine.changes import obstacle

        return adapter_name in self.adapters and obstacle(self, adapter_name) is None
