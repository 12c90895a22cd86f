"""DoRA: W' = m (W + B A) / |W + B A|, a trained length m for every row.   https://arxiv.org/abs/2402.09353"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.adapter import LinearMap
from deltatune.factors import Factor, at_least_single, shift
from deltatune.lora import options
from deltatune.lora.variants.caching import dora_caching
from deltatune.lora.variants.kept import Kept
from deltatune.lora.variants.variant import Pass, Variant

if TYPE_CHECKING:
    from deltatune.methods.lora import LoRA


class Dora(Variant):
    """Trainable: m, one number per output feature, at first the lengths of the rows.

    The lengths that m is divided by are constants for the gradient (section 4.3 of the paper).
    """

    field: ClassVar[str] = "use_dora"
    summand: ClassVar[bool | str] = "it sets the length of the weight's rows"
    views: ClassVar[tuple[str, ...]] = ("lora_magnitude_vector",)

    broadcast: tuple[int, ...]  # shape in which a number per feature multiplies an output

    def __init__(self, offload: bool = False) -> None:
        super().__init__()
        self.kept, self.offload = Kept(), offload

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str, r: int) -> Dora:
        return cls(config.runtime_config.ephemeral_gpu_offload)

    def begin(self, lora: LoRA, layer: LinearMap) -> None:
        positions = layer.up_shape(layer.groups)[2:]
        self.broadcast = (layer.out_features, *positions)
        shape = (1, *self.broadcast) if positions else self.broadcast  # as files have it
        self.lora_magnitude_vector = Factor(*shape)
        with torch.no_grad():
            weight = layer.weight
            there = options.accelerator() if self.offload and weight.device.type == "cpu" else None
            lengths = row_lengths(weight.to(there or weight.device), *lora.whole(*lora.factors())).to(weight.device)
        self.lora_magnitude_vector.weight = nn.Parameter(lengths.reshape(shape))

    @property
    def m(self) -> Tensor:
        return self.lora_magnitude_vector.weight.flatten()

    def adapt(self, weight: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(weight.detach(), dim=1)
        return weight * (self.m / _above_zero(lengths))[:, None]

    def output(self, out: Tensor, at: Pass, lora: LoRA) -> Tensor:
        """z + (g - 1) (z - b) with z = W x + B A x + b and g = m / |W + B A|; g - 1 is small, and rounded little."""
        less_one = self._less_one(at, lora)
        if at.dropped is at.x:
            c = less_one.reshape(self.broadcast)
            out = _Stretched.apply(out, c) if torch.is_grad_enabled() else torch.addcmul(out, out, c.to(out.dtype))
        else:  # what the change of length acts on is thinned too, as in the paper's code
            z = at.layer(at.dropped) + lora.product(at.dropped, at.dropped, at.A, at.B, at.layer)
            out = out + at.layer.scale(z, less_one).to(out.dtype)
        bias = lora.adapted_bias(at.layer)
        return out if bias is None else shift(out, -less_one * bias, at.layer)

    def _less_one(self, at: Pass, lora: LoRA) -> Tensor:
        """g - 1 (out,), without building B A."""
        if torch.compiler.is_compiling():
            return self._worked_out(at, lora)
        keeps = dora_caching() and not self.training and not torch.is_grad_enabled()
        stamp = Kept.stamp(at.layer, lora) if keeps else None
        found = self.kept.get(stamp)
        if found is None:
            found = self._worked_out(at, lora)
            self.kept.put(stamp, found)
        return found

    def _worked_out(self, at: Pass, lora: LoRA) -> Tensor:
        with torch.autocast(self.m.device.type, enabled=False):
            return self.m / row_lengths(at.layer.weight, *lora.whole(at.A, at.B)) - 1

    def train(self, mode: bool = True) -> Dora:
        self.kept.drop()
        return super().train(mode)

    def file_tensors(self) -> dict[str, Tensor]:
        return {"lora_magnitude_vector": self.lora_magnitude_vector.weight}


@torch.no_grad()
def row_lengths(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """|W + B A| of every row, (out,): |w|^2 + 2 w (b A) + |b A|^2 for rows w of W and b of B."""
    wide = torch.promote_types(at_least_single(weight), A.dtype)
    W, A, B = weight.to(wide), A.to(weight.device, wide), B.to(weight.device, wide)
    squares = torch.linalg.vector_norm(W, dim=1).square() + ((2 * (W @ A.T) + B @ (A @ A.T)) * B).sum(dim=1)
    return _above_zero(squares.clamp_min(0).sqrt())


def _above_zero(lengths: Tensor) -> Tensor:
    return lengths.clamp_min(torch.finfo(lengths.dtype).tiny)  # a row of zeros stays one


class _Stretched(torch.autograd.Function):
    """z + c z, in one pass over z each way; c broadcasts."""

    @staticmethod
    def forward(z: Tensor, c: Tensor) -> Tensor:
        return torch.addcmul(z, z, c.to(z.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, c = ctx.saved_tensors
        of_z = grads[0] * (1 + c).to(z.dtype) if ctx.needs_input_grad[0] else None
        of_c = (grads[0] * z).sum_to_size(c.shape).to(c.dtype) if ctx.needs_input_grad[1] else None
        return of_z, of_c
