"""Listening to every attention of a model, whether it goes through transformers' interface or is written by hand."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune.patterns import bare_name
from deltatune.prompts.attention import Recorder
from deltatune.prompts.follow import FUSED, SOFTMAX, Follower, Function, Trail
from deltatune.prompts.product import Product, Roles, as_product

# torch's own attention module runs in one piece: seen from outside, it cannot be followed.
_IN_ONE_PIECE = {
    functional.multi_head_attention_forward,
    *(getattr(torch, name) for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")),
}
_FORGETTING = {functional.linear, functional.layer_norm, functional.conv1d, functional.conv2d}
FUSED_SIGNATURE = "fused"
FUSED_ROLES = "bhtd"

Stack = tuple[nn.Module, ...]


class Listener(Recorder, Follower):
    """Told of every attention of its thread while it listens; prefixes take no part.

    Attributes:
        names: Paths of the modules of the model that is listened to, by identity.
        lost: Modules that computed a softmax over products of queries and keys that could not be followed.
    """

    def __init__(self, model: nn.Module) -> None:
        Follower.__init__(self)
        self.names = {id(module): bare_name(name) for name, module in model.named_modules()}
        self.lost: dict[str, nn.Module] = {}
        self.born: dict[int, tuple[Any, Stack]] = {}  # products, and tensors that come from them: where
        self.broken: set[int] = set()

    def record_own(
        self, module: nn.Module, queries: int, keys: Tensor, values: Tensor, trail: Trail | None, how: dict[str, Roles]
    ) -> None:
        """Told of an attention that a module computes by itself.

        Args:
            queries: Number of queries.
            keys: The keys, and `values`: the values, with axes as the module has them.
            trail: What was followed; None where torch's fused attention is called.
            how: Roles of the axes of "keys" and "values", and the "key product" and "value product" they belong to.
        """

    def heads_of(self, name: str) -> int | None:
        """Number of heads of a module that is known."""
        return None

    def __enter__(self) -> Listener:
        Recorder.__enter__(self)
        Follower.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        Follower.__exit__(self, *error)
        Recorder.__exit__(self)

    # ------------------------------------------------------------------------------------------------- following it all

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:  # the interface told of it already
            return func(*args, **kwargs)
        if func in _IN_ONE_PIECE:
            self._lose(self._stack())
            return func(*args, **kwargs)
        source = self._source((*args, *kwargs.values()))
        if func in SOFTMAX and source is not None and self.trail(args[0] if args else kwargs["input"]) is None:
            self._lose(_common(source, self._stack()))
        result = Follower.__torch_function__(self, func, types, args, kwargs)
        if func in SOFTMAX or func in _FORGETTING:
            return result
        if source is None and as_product(func, args, kwargs) is not None:
            source = self._stack()
        if source is not None:
            changed = args[0] if result is None else result  # None: an assignment to a part of it
            for each in changed if isinstance(changed, (tuple, list)) else (changed,):
                if isinstance(each, Tensor):
                    self.born[id(each)] = (each, source)
        return result

    def _source(self, args: tuple[Any, ...]) -> Stack | None:
        for arg in args:
            for each in arg if isinstance(arg, (tuple, list)) else (arg,):
                if id(each) in self.born:
                    return self.born[id(each)][1]
        return None

    def _product(self, product: Product, result: Tensor) -> Tensor:
        made = Follower._product(self, product, result)
        self.born[id(product)] = (product, self._stack())
        return made

    def hidden_logits(self, trail: Trail, logits: Tensor) -> None:
        if not _agrees(trail, logits):
            self.broken.add(id(trail.product))
        product, stack = self.born[id(trail.product)]
        self.born[id(trail.product)] = (product, _common(stack, self._stack()))

    def attended(self, trail: Trail, product: Product, index: int, axis: int) -> None:
        stack = _common(self.born[id(trail.product)][1], self._stack())
        module = stack[-1] if stack else None
        if module is None:
            return
        which, counting, _ = trail.product.keys()  # type: ignore[misc]
        keys, values = trail.product.operands[which], product.operands[index]
        heads = self.heads_of(self.names[id(module)])
        key_roles, value_roles = trail.product.roles(which, counting, heads), product.roles(index, axis, heads)
        if id(trail.product) in self.broken or key_roles is None or value_roles is None:
            self._lose(stack)
            return
        factor = torch.ones((), dtype=keys.dtype, device=keys.device)
        for step in self.key_steps(keys):
            factor = step(factor)
        how = {
            "keys": key_roles, "values": value_roles,
            "key product": trail.product.signature, "value product": product.signature,
        }  # fmt: skip
        self.record_own(module, trail.product.queries(1 - which), keys / factor, values, trail, how)
        self.trails = [kept for kept in self.trails if kept.product is not trail.product]

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = {**dict(zip(("query", "key", "value"), args)), **kwargs}
        query, key, value = given["query"], given["key"], given["value"]
        stack = self._stack()
        if stack and key.ndim == 4:
            how = {"keys": FUSED_ROLES, "values": FUSED_ROLES}
            how |= {"key product": FUSED_SIGNATURE, "value product": FUSED_SIGNATURE}
            self.record_own(stack[-1], query.shape[2], key, value, None, how)
        else:
            self._lose(stack)
        return FUSED(*args, **kwargs)

    def unmet(self) -> None:
        """Count what went through a softmax and never met values as lost."""
        for trail in self.trails:
            if trail.is_probability:
                self._lose(self.born[id(trail.product)][1])

    # ---------------------------------------------------------------------------------------------------------- where

    def _lose(self, stack: Stack) -> None:
        if stack:
            self.lost.setdefault(self.names[id(stack[-1])], stack[-1])

    def _stack(self) -> Stack:
        """The modules of the model whose methods are running, outermost first."""
        found: list[nn.Module] = []
        frame: Any = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self.names and owner not in found:
                found.append(owner)
            frame = frame.f_back
        return tuple(reversed(found))


def _common(one: Stack, other: Stack) -> Stack:
    """The modules that were running both times."""
    return tuple(a for a, _ in itertools.takewhile(lambda pair: pair[0] is pair[1], zip(one, other)))


def _agrees(trail: Trail, logits: Tensor) -> bool:
    """Whether the steps that were followed lead from the product to the logits of the model."""
    if logits.device.type == "meta":
        return True
    again = trail.product.again(*trail.product.operands)
    try:
        for step in trail.steps:
            again = step(again)
    except RuntimeError:
        return False
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 1e-1
    return again.shape == logits.shape and torch.allclose(again.to(logits), logits, tolerance, tolerance)
