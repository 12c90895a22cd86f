"""Linear layers that keep their weight packed, by whatever library.

What they have in common is `PackedLinear`: the layer runs with its own kernel, and its values are unpacked only where a
method needs the matrix itself. A kind of packing says how its values are unpacked and, if they can be, packed again.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.bases.linear import Linear
from deltatune.errors import MergeError


class Codes(nn.Parameter):
    """A layer's codes, and what else belongs to them (scales, zero points), by the attribute that holds it."""

    beside: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:  # torch's drops attributes
        if id(self) not in memo:
            made = memo[id(self)] = Codes(self.data.clone(), self.requires_grad)
            made.beside = copy.deepcopy(self.beside, memo)
        return memo[id(self)]


class PackedLinear(Linear):
    """A linear layer whose stored weight is not the matrix.

    Attributes:
        scheme: What quantised it, as PEFT calls that.
        parts_of_codes: Attributes of the module that change with its codes.
        differentiable: The kernel has a gradient for its input, or says by its output that it has none.
    """

    scheme: str = ""
    parts_of_codes: ClassVar[tuple[str, ...]] = ()

    @property
    def can_pack(self) -> bool:
        """Whether an adapter can be merged into it."""
        return type(self).pack is not PackedLinear.pack

    @property
    def differentiable(self) -> bool:
        return True

    dense: bool = False

    def unpack(self, stored: Tensor) -> Tensor:
        """The matrix (out, in) of what the layer keeps."""
        raise NotImplementedError

    def pack(self, weight: Tensor) -> nn.Parameter:
        raise MergeError(
            f"{type(self.module).__name__} cannot be packed again here; keep the adapter unmerged, or merge it into "
            "an unquantised copy of the base",
            found=type(self.module).__name__,
        )

    def matrix(self, stored: Tensor) -> Tensor:
        return self.unpack(stored)

    def hold(self, weight: Tensor) -> nn.Parameter:
        return self.pack(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """The kernel's output; where it has no gradient for its input, that of the unpacked matrix stands in."""
        wanted = torch.is_grad_enabled() and x.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.differentiable or not wanted)):
            y = super().__call__(x)
        return _WithGradient.apply(y, x, self) if wanted and not y.requires_grad else y

    def put(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        """Codes with what belongs to them, and the bias, in place of the layer's own."""
        for name, value in vars(weight).get("beside", {}).items():
            setattr(self.module, name, value)
        setattr(self.module, self.keeps[0], weight)
        if self.keeps[1] in self.module._parameters:
            self.module.register_parameter(self.keeps[1], bias)
        elif bias is not None:  # a buffer, or a tensor that is neither
            setattr(self.module, self.keeps[1], bias.detach())

    def codes(self, data: Tensor, **beside: Any) -> Codes:
        """New codes for the layer; its own learn what belongs to them, so that they can come back."""
        old = getattr(self.module, self.keeps[0])
        if not isinstance(old, Codes):
            kept = Codes(old.data, requires_grad=False)
            kept.beside = {name: getattr(self.module, name) for name in self.parts_of_codes}
            setattr(self.module, self.keeps[0], kept)
        made = Codes(data, requires_grad=False)
        made.beside = beside
        return made

    def beside(self, stored: Tensor, name: str) -> Any:
        """What belongs to these codes, which may be those that the layer had before a merge."""
        return vars(stored).get("beside", {}).get(name, getattr(self.module, name))


class _WithGradient(torch.autograd.Function):
    """An output as it is, with the gradient for the input that x W^T has; the matrix is unpacked for it each time."""

    @staticmethod
    def forward(y: Tensor, x: Tensor, layer: PackedLinear) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer, ctx.dtype = inputs[2], inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        return None, (g @ ctx.layer.weight.to(g.dtype)).to(ctx.dtype), None


_SCHEMES = ("gptq", "awq", "aqlm", "eetq", "quanto")


class Opaque(PackedLinear):
    """Any other layer that says its features and keeps codes: GPTQ, AWQ, AQLM, EETQ, INC, quanto, ...

    Its matrix is what it answers to the rows of the identity, so nothing has to be known of how it packs.
    """

    types = ("other quantised linear layers",)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        sides = _sides(module)
        if sides is None or any(True for _ in module.children()):
            return False
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and tuple(weight.shape) == (sides[1], sides[0]):
            return isinstance(module, nn.Linear) and type(weight) not in (nn.Parameter, Tensor)  # codes inside of it
        return any(not tensor.is_floating_point() for tensor in _tensors(module))

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs or {}  # type: ignore[assignment]
        sides = _sides(module)
        assert sides is not None
        self.in_features, self.out_features = sides
        name = f"{type(module).__module__}.{type(module).__name__}".lower()
        self.scheme = next((known for known in _SCHEMES if known in name), name.partition(".")[0])

    @property
    def dtype(self) -> torch.dtype:
        return next((tensor.dtype for tensor in _tensors(self.module) if tensor.is_floating_point()), torch.float32)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def weight(self) -> Tensor:
        device = next(_tensors(self.module)).device
        with torch.no_grad():
            answer = self.module(torch.eye(self.in_features, device=device, dtype=self.dtype))
            return (answer if self.bias is None else answer - self.bias).T


def _sides(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs, under the names that libraries have for them."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        sides = [getattr(module, name, None) for name in names]
        if all(isinstance(side, int) for side in sides):
            return sides[0], sides[1]  # type: ignore[return-value]
    return None


def _tensors(module: nn.Module) -> Any:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
