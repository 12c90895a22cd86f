"""Following a hand-written attention through its own code, operation by operation.

    logits = q k^T  ->  elementwise: scale, bias, mask, soft cap, casts, views  ->  softmax  ->  dropout  ->  probs v

An attention that does not call transformers' interface still does these things, in one forward of one module, with
torch functions that a `TorchFunctionMode` sees. `Follower` keeps a `Trail` for tensors that are on this way. What was
done to the logits is kept as a list of steps, so that it can be done again to logits of other keys (`replay`):

- what is broadcast over the keys (a scale, a temperature of each head, a cast, tanh) is done again;
- what has a value of its own for each key (a mask, a bias between positions) is left out: other keys are neither
  masked nor biased. A bias that counts from a fixed place for all queries (ALiBi) gives other keys the bias of the
  first key that is seen, wherever its model puts the zero.

A tensor that goes another way (gathered, padded, cut into diagonals) is no longer followed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deltatune.prompts.product import Product, as_product

Function = Callable[..., Any]


def _functions(*names: str) -> frozenset[Function]:
    """Every form of some functions: of torch, of tensors, in place, functional."""
    homes = (torch, Tensor, functional)
    forms = (name + ending for name in names for ending in ("", "_"))
    return frozenset(getattr(home, form) for form in forms for home in homes if hasattr(home, form))


ADD = _functions("add", "sub", "subtract")
SCALE = _functions("mul", "multiply", "div", "divide", "true_divide")
HIDE = _functions("masked_fill", "where")
BOUND = _functions("clamp", "clip", "maximum", "max")
PLAIN = _functions(
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "tanh", "neg", "nan_to_num",
    "dropout",
)  # fmt: skip
VIEW = _functions("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "view_as")
MOVE = _functions("transpose", "permute", "swapaxes", "swapdims", "movedim")
SOFTMAX = _functions("softmax")
FUSED = functional.scaled_dot_product_attention
ELEMENTWISE = ADD | SCALE | HIDE | BOUND | PLAIN


@dataclass(frozen=True)
class Step:
    """One operation on the way, with the tensor that is followed as argument `place`.

    Attributes:
        per_key: It has a value for each key, so that other keys are spared it.
        anchor: A bias for each key and head, the same for all queries; None where it is none.
        shape: What the tensor is reshaped to; None where it is not.
    """

    func: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int = 0
    per_key: bool = False
    anchor: Tensor | None = None
    shape: tuple[int, ...] | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.shape is not None:
            return tensor.reshape(*self.shape[:-1], tensor.shape[-1])
        return self.func(*self.args[: self.place], tensor, *self.args[self.place + 1 :], **self.kwargs)


@dataclass(frozen=True, eq=False)
class Trail:
    """A tensor that is followed.

    Attributes:
        product: The q k^T that it came from.
        axis: Which of its axes counts keys, from the right.
        steps: What was done to it since, while it is logits.
        is_probability: Whether it went through the softmax.
        hidden: The probabilities of other keys, once it is probabilities; None where there are none.
        anchored: Whether a bias among the steps counts from a fixed place.
        recorded: Whether gradients were recorded at the softmax: not inside of a `torch.autograd.Function`, whose own
            backward knows no further keys.
    """

    tensor: Tensor
    product: Product
    axis: int
    steps: tuple[Step, ...] = ()
    is_probability: bool = False
    hidden: Tensor | None = None
    anchored: bool = False
    recorded: bool = True


class Follower(TorchFunctionMode):
    """Follows the attentions that are computed while it is on. What happens at the softmax is up to subclasses.

    Attributes:
        anchored: Whether biases count from a fixed place, which one query alone does not show; None: look at several.
    """

    anchored: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.trails: list[Trail] = []  # searched by identity, which torch.compile can trace; ids it cannot
        self.scaled: list[tuple[Tensor, tuple[Step, ...]]] = []

    # ----------------------------------------------------------------------------------- what subclasses make of it

    def hidden_logits(self, trail: Trail, logits: Tensor) -> Tensor | None:
        """Logits of further keys, laid out as `logits` but for the number of keys; None for none."""
        return None

    def hidden_values(self, trail: Trail, product: Product, index: int, axis: int) -> Tensor:
        """Values of the further keys, laid out as operand `index` of the product, whose `axis` counts keys."""
        raise NotImplementedError

    def attended(self, trail: Trail, product: Product, index: int, axis: int) -> None:
        """Told of every attention when it meets its values."""

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Asked to compute `scaled_dot_product_attention`."""
        return FUSED(*args, **kwargs)

    # --------------------------------------------------------------------------------------------------- the operations

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is FUSED:
            return self.fused(args, kwargs)
        if func in SOFTMAX:
            return self._softmax(func, args, kwargs)
        product = as_product(func, args, kwargs)
        if product is not None:
            return self._product(product, func(*args, **kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._step(func, args, kwargs, result)
        return result

    def trail(self, tensor: Any) -> Trail | None:
        for trail in self.trails:
            if trail.tensor is tensor:
                return trail
        return None

    def _keep(self, trail: Trail) -> None:
        self._drop(trail.tensor)
        self.trails.append(trail)

    def _drop(self, tensor: Tensor) -> None:
        self.trails = [trail for trail in self.trails if trail.tensor is not tensor]

    def _product(self, product: Product, result: Tensor) -> Tensor:
        for index, operand in enumerate(product.operands):
            trail = self.trail(operand)
            if trail is not None and trail.is_probability:
                axis = product.partner(index, operand.ndim + trail.axis)
                if axis is None:
                    continue
                if trail.hidden is not None:
                    values = self.hidden_values(trail, product, 1 - index, axis)
                    both = (trail.hidden, values) if index == 0 else (values, trail.hidden)
                    result = result + product.again(*both)
                self.attended(trail, product, 1 - index, axis)
                return result
        keys = product.keys()
        if keys is not None:
            trail = Trail(result, product, keys[2])
            if product.added is not None:
                trail = replace(trail, steps=(self._added(torch.add, (None, product.added), {}, 0, trail, result),))
            self._keep(trail)
        return result

    def _step(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        place, trail = next(((i, found) for i, arg in enumerate(args) if (found := self.trail(arg))), (0, None))
        if trail is None:
            self._scale(func, args, kwargs, result)
            return
        args = (*args[:place], None, *args[place + 1 :])  # a step needs the others only
        step, axis = None, trail.axis
        count = trail.tensor.shape[axis]
        if func in VIEW:
            if axis == -1 and result.ndim and result.shape[-1] == count:
                step = Step(func, args, kwargs, shape=tuple(result.shape))
        elif func in MOVE:
            axis = _moved(func, trail.tensor.ndim, args, kwargs, axis)
            step = Step(func, args, kwargs)
        elif func in ELEMENTWISE and result.ndim >= -axis and result.shape[axis] == count:
            if func in HIDE:
                step = Step(func, args, kwargs, place, per_key=True)
            elif func in PLAIN:
                step = Step(func, args, kwargs, place)
            else:
                step = self._added(func, args, kwargs, place, trail, result)
        if step is None or (result is not trail.tensor and any(result is arg for arg in args)):
            if result is trail.tensor:
                self._drop(result)
            return
        if trail.is_probability:
            hidden = trail.hidden if trail.hidden is None or step.per_key else step(trail.hidden)
            made = replace(trail, tensor=result, axis=axis, hidden=hidden)
        else:
            made = replace(trail, tensor=result, axis=axis, steps=(*trail.steps, step))
        if (
            func in ELEMENTWISE
        ):  # a view may have been made to look at only; anything else is kept no longer than needed
            self._drop(trail.tensor)
        self._keep(made)

    def _added(
        self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], place: int, trail: Trail, result: Tensor
    ) -> Step:
        """A step with another tensor, which has a value for each key, or is broadcast over them."""
        axis, count = trail.axis, trail.tensor.shape[trail.axis]
        other = next(iter(_others(args, kwargs, place)), None)
        if other is None or other.ndim < -axis or other.shape[axis] != count or (count == 1 and func not in ADD):
            return Step(func, args, kwargs, place)
        # Per head, but the same for all queries.
        fixed = func in ADD and axis == -1 and other.ndim > 2 and other.shape[-3] > 1 and other.shape[-2] == 1
        if fixed and (result.shape[-2] > 1 if self.anchored is None else self.anchored):
            return Step(func, args, kwargs, place, per_key=True, anchor=other)
        return Step(func, args, kwargs, place, per_key=True)

    def _scale(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        """Remembers what a tensor was multiplied by: some models scale their keys instead of the logits."""
        first = args[0] if args else None
        before = self.key_steps(first)
        if func in SCALE and isinstance(first, Tensor) and all(other.ndim == 0 for other in _others(args, kwargs, 0)):
            self.scaled.append((result, (*before, Step(func, (None, *args[1:]), kwargs))))
        elif before and (func in VIEW or func in MOVE):
            self.scaled.append((result, before))

    def key_steps(self, key: Any) -> tuple[Step, ...]:
        """What a model multiplied its keys by before the product."""
        for tensor, steps in reversed(self.scaled):  # the last one, where it was multiplied in place
            if tensor is key:
                return steps
        return ()

    def _softmax(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        logits = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        trail = self.trail(logits)
        if (
            trail is None
            or trail.is_probability
            or dim is None
            or (dim - logits.ndim if dim >= 0 else dim) != trail.axis
        ):
            return func(*args, **kwargs)
        hidden = self.hidden_logits(trail, logits)
        anchored = any(step.anchor is not None for step in trail.steps)
        self._drop(logits)
        if hidden is None:
            result = func(*args, **kwargs)
        else:
            rest = {name: value for name, value in kwargs.items() if name != "input"}
            joint = func(torch.cat([hidden.to(logits), logits], trail.axis), *args[1:], **rest)
            count = hidden.shape[trail.axis]
            hidden = joint.narrow(trail.axis, 0, count)
            result = joint.narrow(trail.axis, count, logits.shape[trail.axis]).contiguous()
        recorded = torch.is_grad_enabled()
        made = replace(trail, tensor=result, steps=(), is_probability=True, hidden=hidden, anchored=anchored)
        self._keep(replace(made, recorded=recorded))
        return result


def replay(steps: tuple[Step, ...], hidden: Tensor, logits: Tensor) -> Tensor:
    """Do to the logits `hidden` of further keys what was done to those of the model, which ended as `logits`."""
    for step in steps:
        if step.anchor is not None:
            hidden = _with_anchor(step, hidden, logits)
        elif not step.per_key:
            hidden = step(hidden)
    return hidden


def _with_anchor(step: Step, hidden: Tensor, logits: Tensor) -> Tensor:
    """Adds the bias of the first key that any query sees."""
    assert step.anchor is not None
    seen = (logits > torch.finfo(logits.dtype).min / 2).any(-2)  # (..., keys)
    first = seen.to(torch.uint8).argmax(-1, keepdim=True).reshape(*hidden.shape[:-2], 1, 1)
    bias = step.anchor.expand(*hidden.shape[:-2], 1, step.anchor.shape[-1]).gather(-1, first)
    bias = torch.where(seen.any(-1).reshape(bias.shape), bias, torch.zeros_like(bias))
    args = (hidden, bias) if step.place == 0 else (bias, hidden)
    return step.func(*args, **step.kwargs)


def _others(args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> list[Tensor]:
    """Tensors that a call computes with, beside argument `place`."""
    everything = (*args[:place], *args[place + 1 :], *kwargs.values())
    return [each for each in everything if isinstance(each, Tensor)]


def _moved(func: Function, ndim: int, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> int:
    """Where an axis goes when axes are exchanged."""
    marked = torch.empty([2 if i == ndim + axis else 1 for i in range(ndim)], device="meta")
    moved = func(marked, *args[1:], **kwargs)
    return moved.shape.index(2) - moved.ndim
