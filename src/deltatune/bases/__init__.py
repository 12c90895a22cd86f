"""Kinds of frozen layers, each seen as a `LinearMap`. A new kind is a file here and an entry in `KINDS`."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltatune.adapter import LinearMap
from deltatune.bases.attention import JointProjection
from deltatune.bases.bitsandbytes import Bitsandbytes4bit, Bitsandbytes8bit
from deltatune.bases.conv import Conv
from deltatune.bases.embedding import Embedding
from deltatune.bases.fp8 import FP8
from deltatune.bases.hqq import HQQ
from deltatune.bases.inc import INC
from deltatune.bases.linear import Linear
from deltatune.bases.module import OneWeight
from deltatune.bases.packed import Opaque, PackedLinear
from deltatune.bases.parallel import Megatron, TransformerEngine
from deltatune.bases.sliced import SlicedLinear
from deltatune.bases.torchao import Torchao
from deltatune.bases.transposed import Transposed

# torchao and slices before Linear: their layers are nn.Linear, whose weight claims the type of the values. Last what
# fits no other.
KINDS = (
    *(Torchao, SlicedLinear, Linear, Transposed, Embedding, Conv, JointProjection, Megatron, TransformerEngine),
    *(Bitsandbytes4bit, Bitsandbytes8bit, HQQ, FP8, INC, Opaque),
    OneWeight,
)


def as_map(module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> LinearMap | None:
    """The layer as a linear map, or None when no kind fits; further call arguments are passed to the layer."""
    # the commonest layer of all, which is asked for several times by whatever walks over a model
    if type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter and Linear.fits(module):
        return Linear(module, args, kwargs)
    if module._modules and not module._parameters and not module._buffers:  # a block, which most modules are
        return None
    for kind in KINDS:
        if kind.fits(module):
            return kind(module, args, kwargs or {})
    return None


def supported() -> list[str]:
    """Names of the layer types that can be adapted, for error messages."""
    plain_first = sorted(KINDS, key=lambda kind: issubclass(kind, PackedLinear))
    return [name for kind in plain_first for name in kind.types]
