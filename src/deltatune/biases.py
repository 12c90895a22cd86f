"""Trained biases of the base beside an adapter, `bias="all"` and `bias="lora_only"`: b' beside b, and active with it.

PEFT trains the base's own. Here each adapter has a copy, so that disabling gives the base back, and several adapters
may have one. Files hold b' under PEFT's keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, Applied, LinearMap
from deltatune.errors import ConfigError
from deltatune.factors import shift
from deltatune.notice import warn

DECLARED = ("identity_at_birth", "replaces", "mergeable", "deterministic", "lossless", "pointwise", "reads", "views")


def check(owner: str, value: str, own: str) -> None:
    """Refuse what is no choice of biases; `own` is the method's word for those of its own layers."""
    checks.one_of(owner, "bias", value, ("none", "all", own))


class TrainedBias(Adapter):
    """Trainable: b', which starts at b. The layer's bias moves by b' - b, so that several add up."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "module"})
    views: ClassVar[tuple[str, ...]] = ("trained_bias",)

    before: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())
        self.register_buffer("before", bias.detach().clone(), persistent=False)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        assert bias is not None
        return bias + (self.bias - self.before).to(torch.promote_types(bias.dtype, self.bias.dtype))

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        if layer.kind == "module":  # its bias need not be what it adds last
            return super().forward(x, layer)
        return shift(layer(x), self.bias - self.before, layer)

    def live_tensors(self) -> dict[str, tuple[nn.Module, str]]:
        return {"trained_bias": (self, "bias")}  # the layer's `bias` is the adapted one


class WithBias(Adapter):
    """An adapter after a trained bias, as one adapter; to all who ask it anything else it is the adapter alone."""

    def __init__(self, adapter: Adapter, trained: TrainedBias) -> None:
        super().__init__()
        self.adapter, self.trained = adapter, trained
        for name in DECLARED:
            vars(self)[name] = getattr(adapter, name)
        vars(self)["views"] = (*adapter.views, *trained.views)
        vars(self)["shared"] = adapter.shared

    @property
    def core(self) -> Adapter:
        return self.adapter

    def adapt(self, weight: Tensor) -> Tensor:
        return self.adapter.adapt(weight)

    def adapted_bias(self, layer: LinearMap) -> Tensor | None:
        return self.adapter.adapted_bias(Applied(self.trained, layer))

    def forward(self, x: Any, layer: LinearMap, **values: Any) -> Tensor:
        return self.adapter(x, Applied(self.trained, layer), **values)

    def penalty(self) -> Tensor | None:
        return self.adapter.penalty()

    def joins(self, beside: nn.ModuleDict) -> None:
        self.adapter.joins(beside)

    def settle(self, layer: LinearMap) -> None:
        self.adapter.settle(layer)

    def make_room(self, rank: int | None = None) -> None:
        self.adapter.make_room(rank)

    def fit(self, other: Adapter) -> None:
        self.adapter.fit(other.core)

    def neutral(self) -> bool:
        return self.adapter.neutral()  # the bias is fresh, so it is the layer's

    def tied(self, layer: LinearMap, config: Any = None) -> Adapter | None:
        return self.adapter.tied(layer, config)

    def live_tensors(self) -> dict[str, tuple[nn.Module, str]]:
        return {**self.adapter.live_tensors(), **self.trained.live_tensors()}

    def live_parts(self) -> dict[str, nn.Module]:
        return self.adapter.live_parts()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_modules" not in self.__dict__ or "adapter" not in self._modules:
                raise
        return getattr(self._modules["adapter"], name)

    # ------------------------------------------------------------------------------------------------------- files

    @property
    def keeps_derived(self) -> bool:  # type: ignore[override]
        return self.adapter.keeps_derived

    @keeps_derived.setter
    def keeps_derived(self, value: bool) -> None:
        self.adapter.keeps_derived = value

    def derived_tensors(self) -> dict[str, Tensor]:
        return self.adapter.derived_tensors()

    def kept_tensors(self) -> dict[str, Tensor]:
        return self.adapter.kept_tensors()

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {key: tensor for key, tensor in tensors.items() if key != _KEY}
        return self.adapter.from_file(own) | {key: tensor for key, tensor in tensors.items() if key == _KEY}

    def file_tensors(self) -> dict[str, Tensor]:
        return {**self.adapter.file_tensors(), _KEY: self.trained.bias}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.trained.bias.data.copy_(tensors[_KEY])
        self.adapter.load_file_tensors({key: tensor for key, tensor in tensors.items() if key != _KEY})


_KEY = "base_layer.bias"  # below a layer that has an adapter too


def of_peer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without biases of modules trained whole that PEFT repeats under the names of its wrapper."""
    wrapped = re.compile(r"\.(modules_to_save|original_module)(?=\.bias$)")
    return {
        key: tensor for key, tensor in tensors.items() if (plain := wrapped.sub("", key)) == key or plain not in tensors
    }


def build(
    layers: Iterator[tuple[str, nn.Module, LinearMap | None]],
    choice: str,
    built: dict[int, Adapter],
    place: Callable[[Adapter, nn.Module, LinearMap], None],
) -> None:
    """Trained biases for the layers that `built` has adapters for, and with "all" for every other; `built` gets them.

    Args:
        layers: Path, module and map of all modules outside of trained copies.
        place: Puts an adapter into the place and precision of its layer.

    Raises:
        ConfigError: With "all", a module has a bias and is seen as no map.
    """
    found = False
    for path, module, layer in layers:
        adapter = built.get(id(module))
        if isinstance(adapter, (WithBias, TrainedBias)):  # under another path
            continue
        bias = None if layer is None or layer.keeps[1] != "bias" else layer.bias
        if bias is None or layer is None or layer.kind not in TrainedBias.base_kinds:
            _refuse_hidden(path, module, choice)
            continue
        if adapter is None and choice != "all":
            continue
        trained = TrainedBias(bias)
        place(trained, module, layer)
        built[id(module)] = trained if adapter is None else WithBias(adapter, trained)
        found = True
    if not found:
        warn(f"bias={choice!r}: no {'layer' if choice == 'all' else 'adapted layer'} has a bias, so none is trained")


def _refuse_hidden(path: str, module: nn.Module, choice: str) -> None:
    held = module._parameters.get("bias")
    if choice == "all" and held is not None:
        raise ConfigError(
            f"bias='all': the bias of {path}, a {type(module).__name__}, cannot be trained beside the base: it is no "
            "layer that is computed with a weight and a bias alone; choose the bias of adapted layers only",
            field="bias",
            path=path,
            found=choice,
        )
