"""Looking at an attention that a module computes by itself, outside of transformers' interface.

The module's code is followed as the seam follows it (`deltatune.prompts.follow`), inside of what adds the prefix. So it
is what the module sees: keys, values and mask of the tokens. The prefix adds its columns outside of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltatune.prompts.follow import ADD, FUSED, Follower, Step, Trail
from deltatune.prompts.own import Layout
from deltatune.prompts.product import Product, canonical


@dataclass
class Own:
    """One attention of a module that computes it by itself, as it sees it.

    Attributes:
        query: (rows, heads, queries, dim); `key` and `value` likewise.
        mask: What hides keys, `bias`: what is added to the logits head by head; None where there is none.
        function: The softmax, or torch's fused attention.
    """

    query: list[int]
    key: list[int]
    value: list[int]
    mask: Tensor | None
    bias: Tensor | None
    function: Any


class Look(Follower):
    """Follows the attentions of one forward pass of `module` and tells `seen` of each."""

    def __init__(self, module: nn.Module, layout: Layout, heads: int, seen: Callable[[nn.Module, Own], None]) -> None:
        super().__init__()
        self.module, self.layout, self.heads, self.seen = module, layout, heads, seen
        self.softmaxes: list[tuple[Trail, Any]] = []  # what was followed up to it, and the function

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        trail = self.trail(args[0] if args else kwargs["input"])
        if trail is not None:
            self.softmaxes.append((trail, func))
        return super()._softmax(func, args, kwargs)

    def attended(self, trail: Trail, product: Product, index: int, axis: int) -> None:
        before, function = next(pair for pair in self.softmaxes if pair[0].product is trail.product)
        which = trail.product.keys()[0]  # type: ignore[index]
        key = self._shape(trail.product.operands[which], self.layout.keys.get(trail.product.signature))
        value = self._shape(product.operands[index], self.layout.values.get(product.signature))
        queries, query = trail.product.queries(1 - which), trail.product.operands[1 - which]
        rows = query.numel() // (queries * key[3])  # heads are inside
        per_key = [step for step in before.steps if step.per_key]
        masks = [step for step in per_key if not _is_bias(step)]
        biases = [step for step in per_key if _is_bias(step)]
        self.seen(
            self.module,
            Own(
                [key[0], max(1, rows // key[0]), queries, key[3]],
                key,
                value,
                _operand(masks[-1]) if masks else None,
                _operand(biases[-1]) if biases else None,
                function,
            ),
        )

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = {**dict(zip(("query", "key", "value", "attn_mask"), args)), **kwargs}
        query, key, value = (list(given[name].shape) for name in ("query", "key", "value"))
        self.seen(self.module, Own(query, key, value, given.get("attn_mask"), None, FUSED))
        return super().fused(args, kwargs)

    def _shape(self, operand: Tensor, roles: str | None) -> list[int]:
        """(rows, heads, keys, dim); of an operand that the trial pass did not show, what it has last."""
        if roles is not None:
            return list(canonical(operand, roles, self.heads).shape)
        sizes = [1, 1, 1, *operand.shape]
        return [math.prod(sizes[:-3]), *sizes[-3:]]


def _operand(step: Step) -> Tensor | None:
    return next((each for each in (*step.args, *step.kwargs.values()) if isinstance(each, Tensor)), None)


def _is_bias(step: Step) -> bool:
    """Whether what a step adds differs from head to head and hides nothing."""
    added = _operand(step)
    if step.func not in ADD or added is None or added.ndim < 3 or added.shape[-3] == 1:
        return False
    return not bool((added < -1e4).any())


class Looking:
    """The two hooks that put a `Look` on every forward pass of one module."""

    def __init__(self, layout: Layout, heads: int, seen: Callable[[nn.Module, Own], None]) -> None:
        self.layout, self.heads, self.seen = layout, heads, seen
        self.modes: list[Look] = []

    def put_on(self, module: nn.Module) -> list[Any]:
        """The handles of the hooks."""
        return [
            module.register_forward_pre_hook(self.before),  # after the prefix's, so that it looks from inside
            module.register_forward_hook(self.after, prepend=True, always_call=True),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        mode = Look(module, self.layout, self.heads, self.seen)
        mode.__enter__()
        self.modes.append(mode)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.modes:
            self.modes.pop().__exit__(None, None, None)
