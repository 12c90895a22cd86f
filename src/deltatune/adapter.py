"""The algebra: a frozen layer is a linear map, an adapter is a trainable change to it, and the result is a map again.

LinearMap   x -> x @ weight.T + bias, however the layer stores and runs it
Adapter     weight -> adapt(weight), the definition of a method; `forward` is the same map, made cheap
Applied     adapter after map: a map, so stacking adapters is composition
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from deltatune.calls import Value
from deltatune.config import PeftConfig, PeftType
from deltatune.errors import MergeError


class LinearMap(Protocol):
    """A frozen layer seen as a matrix; a block of layers, which has none, is met by adapters of its output alone.

    keeps           names of the module's parameters that are `weight` and `bias`
    only_weight     its output is no linear map of its input, so that adapters act through the adapted weight alone
    parts           modules inside of it that are adapted with it

    `in_features` and `out_features` are the sides of `weight`. A convolution's input side counts channels x kernel
    positions (`kernel` of them per channel), an embedding's counts its rows.
    """

    keeps: tuple[str, str]
    only_weight: bool
    parts: tuple[str, ...]
    in_features: int
    out_features: int
    kernel: int

    @property
    def weight(self) -> Tensor: ...  # (out, in), dense
    @property
    def bias(self) -> Tensor | None: ...  # (out,)
    @property
    def kind(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...  # of the values, whatever they are packed in
    def __call__(self, x: Any) -> Tensor: ...  # the layer's own fast way
    def apply(self, x: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...  # with another (any, in) matrix
    def matrix(self, stored: Tensor) -> Tensor: ...  # a weight in the layer's own layout -> (out, in)
    def store(self, weight: Tensor) -> Tensor: ...  # and back
    def hold(self, weight: Tensor) -> nn.Parameter: ...  # (out, in) -> the parameter in which the layer would keep it
    def down_shape(self, rank: int) -> tuple[int, ...]: ...  # in which files keep a factor that reads the input
    def up_shape(self, rank: int) -> tuple[int, ...]: ...  # in which files keep a factor that writes the output
    def mix(self, h: Tensor, matrix: Tensor) -> Tensor: ...  # matrix (out, h) over the feature axis of an output
    def scale(self, y: Tensor, vector: Tensor) -> Tensor: ...  # vector (out,) times the features of an output


class Adapter(nn.Module):
    """A trainable change to a linear map. A method is complete once `adapt` is written.

    A change that no weight can hold (`mergeable`) is complete once `forward` is written, which is its definition then.

    Class attributes declare what the laws need to know of a method; where an option decides, an instance sets its own:
        base_kinds: Kinds of layers its maths allows (`LinearMap.kind`).
        identity_at_birth: True, or the reason why a fresh adapter changes the output.
        mergeable: True, or the reason why no weight can hold the change, so that `adapt` is not defined.
        reads: What it has to know about a call; `forward` is handed each by name.
        views: Attributes that programs read per adapter on a layer, as in `layer.lora_A["default"]`.
    """

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    identity_at_birth: bool | str = True
    mergeable: bool | str = True
    reads: tuple[Value, ...] = ()
    views: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str) -> Adapter:
        """A fresh adapter for the layer at `path`, its parameters on the CPU in float32."""
        raise NotImplementedError

    def adapt(self, weight: Tensor) -> Tensor:
        """W -> W', both (out, in).

        Raises:
            MergeError: No weight can hold the change.
        """
        if self.mergeable is not True:
            raise MergeError(
                f"no weight can hold {type(self).__name__}, because {self.mergeable}; "
                "call the layer instead of reading its weight, and leave the adapter unmerged",
                found=type(self).__name__,
            )
        raise NotImplementedError

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias

    def forward(self, x: Any, layer: LinearMap, **values: Any) -> Tensor:
        return layer.apply(x, self.adapt(layer.weight), self.adapt_bias(layer.bias))

    # Files carry PEFT's names and shapes; most methods use them for their parameters and need no translation.

    def file_tensors(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Fill the parameters; names and shapes have been checked against `file_tensors`."""
        for name, parameter in self.named_parameters():
            parameter.data.copy_(tensors[name])


class Applied:
    """An adapter applied to a map; `read` answers what it has to know about the call, by name."""

    def __init__(self, adapter: Adapter, inner: LinearMap, read: Callable[[str], Any] = lambda name: None) -> None:
        self.adapter, self.inner, self.read = adapter, inner, read
        self.in_features, self.out_features, self.kernel = inner.in_features, inner.out_features, inner.kernel
        self.keeps, self.only_weight, self.parts = inner.keeps, inner.only_weight, inner.parts

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def weight(self) -> Tensor:
        return self.adapter.adapt(self.inner.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.adapt_bias(self.inner.bias)

    def __call__(self, x: Any) -> Any:
        if self.only_weight:
            return self.inner.apply(x, self.weight, self.bias)
        return self.adapter(x, self.inner, **{value.name: self.read(value.name) for value in self.adapter.reads})

    def apply(self, x: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.inner.apply(x, weight, bias)

    def matrix(self, stored: Tensor) -> Tensor:
        return self.inner.matrix(stored)

    def store(self, weight: Tensor) -> Tensor:
        return self.inner.store(weight)

    def hold(self, weight: Tensor) -> nn.Parameter:
        return self.inner.hold(weight)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        return self.inner.down_shape(rank)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        return self.inner.up_shape(rank)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return self.inner.mix(h, matrix)

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        return self.inner.scale(y, vector)


@dataclass(frozen=True)
class Method:
    """A method's entry in the registry.

    Attributes:
        adapter: What is grafted onto a layer; None where a method acts elsewhere (prefix tuning at the attention).
        graft: What connects such a method with the model (`deltatune.prompts.graft`).
        encoder: What such a method trains, built from its config.
        key_prefix: How the names of its tensors begin, for programs that filter parameters by it.
        default_targets: Model type -> layers it adapts when the user names none.
        learning_rate: What `deltatune train` uses when the user names none; perhaps a function of the options.
        train_options: Options that `deltatune train` sets where the user does not: those given -> those to add.
    """

    peft_type: PeftType | str
    config: type[PeftConfig]
    adapter: type[Adapter] | None
    key_prefix: str
    default_targets: Callable[[str], Any] | None = None
    graft: type[Any] | None = None
    encoder: type[nn.Module] | None = None
    learning_rate: float | Callable[[dict[str, Any]], float] = 1e-3
    train_options: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda given: {})

    @property
    def name(self) -> str:
        """The method as settings and the command line write it."""
        return str(getattr(self.peft_type, "value", self.peft_type)).lower()
