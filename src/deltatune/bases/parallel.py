"""Linear layers of Megatron and TransformerEngine, whose output may come with a bias that the caller adds.

Their weight is a plain matrix as long as one process has all of it. A process that has a shard would need a factor of
its own in step with the others', so sharded layers are refused.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from deltatune.bases.linear import Linear
from deltatune.errors import MergeError

SHARD = "shard of a linear"  # the kind of a layer of which other processes have the rest


class ParallelLinear(Linear):
    """A layer that returns (output, bias), the bias None where it is in the output already.

    Seen as a map it is x -> the output alone; `paired` gives callers of the layer what they expect.
    """

    kind: str = "linear"
    dense: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        output = self.module(x, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def taken(self, x: Tensor) -> Tensor:
        """The input of the map, of what callers give the layer."""
        return x

    def paired(self, y: Tensor) -> Any:
        """The output of the map as the layer would return it."""
        raise NotImplementedError


class Megatron(ParallelLinear):
    """`ColumnParallelLinear` and `RowParallelLinear` of megatron.core."""

    types = ("ColumnParallelLinear", "RowParallelLinear")

    @staticmethod
    def fits(module: nn.Module) -> bool:
        library = sys.modules.get("megatron.core.tensor_parallel")
        if library is None or not isinstance(module, (library.ColumnParallelLinear, library.RowParallelLinear)):
            return False
        return isinstance(module.weight, Tensor)  # one that is given its weight at every call has none of its own

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs or {}  # type: ignore[assignment]
        layer: Any = module
        self.in_features, self.out_features = layer.input_size, layer.output_size
        if tuple(layer.weight.shape) != (self.out_features, self.in_features):
            self.kind = SHARD
        self.apart = bool(layer.skip_bias_add)
        self.keeps = ("weight", "" if self.apart else "bias")  # a bias that the caller adds is none of the map's

    @property
    def bias(self) -> Tensor | None:
        bias: Any = self.module.bias
        return None if self.apart else bias

    def paired(self, y: Tensor) -> Any:
        return y, self.module.bias if self.apart else None


class TransformerEngine(ParallelLinear):
    """`transformer_engine.pytorch.Linear`; with a quantised weight it runs and trains, and is not merged into."""

    types = ("Linear of TransformerEngine",)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        library = sys.modules.get("transformer_engine.pytorch")
        return library is not None and isinstance(module, library.Linear) and "weight" in module._parameters

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(module, args, kwargs)
        layer: Any = module
        if tuple(layer.weight.shape) != (self.out_features, self.in_features):
            self.kind = SHARD
        self.apart = bool(getattr(layer, "return_bias", False))
        none = layer.bias is None or not layer.bias.numel()  # without a bias there is an empty tensor
        self.keeps = ("weight", "" if self.apart or none else "bias")

    @property
    def weight(self) -> Tensor:
        stored: Any = self.module.weight
        return stored if type(stored) is nn.Parameter else stored.dequantize()

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias if self.keeps[1] else None

    def hold(self, weight: Tensor) -> nn.Parameter:
        if type(self.module.weight) is not nn.Parameter:
            raise MergeError(
                f"the weight of this {type(self.module).__name__} is a {type(self.module.weight).__name__}, which is "
                "not packed again here; keep the adapter unmerged",
                found=type(self.module.weight).__name__,
            )
        return super().hold(weight)

    def paired(self, y: Tensor) -> Any:
        return (y, self.module.bias) if self.apart else y
