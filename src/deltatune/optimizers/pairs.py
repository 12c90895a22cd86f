"""The factors A (r, in) and B (out, r) of every LoRA of a model that trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from deltatune.errors import StateError
from deltatune.inject import adapted_layers
from deltatune.methods.lora import LoRA


@dataclass(frozen=True)
class Pair:
    """The factors of one layer; an update is scaling * B A.

    Attributes:
        A, B: The parameters, in the shape in which files keep them (those of a convolution have kernel axes).
        embedding: The layer is an embedding.
    """

    path: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    embedding: bool


def trained_pairs(model: nn.Module) -> Iterator[Pair]:
    """Those whose B trains, each once."""
    seen: set[int] = set()
    for path, layer in adapted_layers(model):
        for adapter in (held.core for held in layer.adapters.values()):
            if not isinstance(adapter, LoRA) or id(adapter) in seen:
                continue
            seen.add(id(adapter))
            A, B = adapter.lora_A.weight, adapter.lora_B.weight
            if isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter) and B.requires_grad:
                yield Pair(path, A, B, adapter.scaling, adapter.embedding)


def matrix(factor: Tensor) -> Tensor:
    """A factor as a matrix: a convolution's kernel positions join its channels."""
    return factor.flatten(1)


def none_found(called: str) -> StateError:
    return StateError(
        f"{called}: no LoRA of this model trains; add one with get_peft_model(model, LoraConfig(...)) and make it "
        "active, or use an optimizer of torch",
        field="model",
    )
