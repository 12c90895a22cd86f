"""Prefixes for attentions that compute by themselves, outside of transformers' attention interface.

While such a module runs forward, `Grafting` follows its own code (`deltatune.prompts.follow`) and adds the prefix where
softmax(q k^T) v would have it:

    joint  = softmax([logits of the prefix; logits of the tokens])
    output = P_prefix V_prefix + P_tokens V_tokens

The module itself only ever sees the columns of its tokens, so all of its shapes stay. A call of torch's own
`scaled_dot_product_attention` gets longer keys, values and mask instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import StateError
from deltatune.prompts import attention
from deltatune.prompts.follow import FUSED, Follower, Trail, replay
from deltatune.prompts.handed import KeysValues
from deltatune.prompts.product import Product, Roles, lay_out

if TYPE_CHECKING:
    from deltatune.prompts.attention import Slot


@dataclass(frozen=True)
class Layout:
    """How one module writes its attention.

    Attributes:
        keys: Roles of the axes of the keys, by the signature of the product with the queries.
        values: Roles of the axes of the values, by the signature of the product with the probabilities.
        anchored: Whether it has a bias that counts from a fixed place, the same for all queries (ALiBi).
    """

    keys: dict[str, Roles] = field(default_factory=dict)
    values: dict[str, Roles] = field(default_factory=dict)
    anchored: bool = False


class Grafting(Follower):
    """Adds a prefix to the attention that one module computes in one forward pass."""

    def __init__(self, module: nn.Module, layout: Layout, slot: Slot, one: KeysValues) -> None:
        super().__init__()
        self.module = module
        self.layout = layout
        self.slot = slot
        self.prefix = one
        self.anchored = layout.anchored
        self.waiting = 0
        self.reached = 0

    def hidden_logits(self, trail: Trail, logits: Tensor) -> Tensor:
        product = trail.product
        index = product.keys()[0]  # type: ignore[index]
        keys = product.operands[index]
        roles = self._roles(self.layout.keys, product)
        self._for_rows(keys, roles)
        prefix = lay_out(_with_rows(self.prefix.key).to(keys), roles, keys)
        for step in self.key_steps(keys):
            prefix = step(prefix)
        self.waiting += 1
        return self._hide(replay(trail.steps, product.with_operand(index, prefix), logits), trail.axis)

    def hidden_values(self, trail: Trail, product: Product, index: int, axis: int) -> Tensor:
        values = product.operands[index]
        self.waiting -= 1
        self.reached += 1
        return lay_out(_with_rows(self.prefix.value).to(values), self._roles(self.layout.values, product), values)

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args)), **kwargs}
        query, key, value, mask = (given.pop(name, None) for name in names[:4])
        self.reached += 1
        self._for_rows(key, "bhtd")
        if given.pop("is_causal", False):  # "upper left": query i sees keys 0..i
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if mask is None and self.prefix.visible is not None:
            mask = torch.ones(1, key.shape[-2], dtype=torch.bool, device=query.device)
        if mask is not None:
            mask = self._longer(mask.expand(*mask.shape[:-1], key.shape[-2]))
        key = torch.cat([lay_out(_with_rows(self.prefix.key).to(key), "bhtd", key), key], dim=2)
        value = torch.cat([lay_out(_with_rows(self.prefix.value).to(value), "bhtd", value), value], dim=2)
        return FUSED(query, key, value, attn_mask=mask, **given)

    def check(self) -> None:
        """Raises StateError where this pass took another way than the trial pass."""
        if self.waiting or not self.reached:
            self._refuse("its attention could not be followed in this call")

    # ------------------------------------------------------------------------------------- rows with different prefixes

    def _for_rows(self, keys: Tensor, roles: Roles) -> None:
        """Have the prefix of each row of the batch that these keys show; an encoder may see fewer than its decoder."""
        if self.prefix.visible is None:
            return
        rows = (
            keys.shape[roles.index("f")] // self.prefix.key.shape[1] if "f" in roles else keys.shape[roles.index("b")]
        )
        if rows != len(self.prefix.visible):
            prefix = self.slot.stage.prefix_of(self.slot.site, rows)
            assert prefix is not None
            self.prefix = prefix

    def _hide(self, hidden: Tensor, axis: int) -> Tensor:
        """Logits of the prefix without what a row does not see; rows lead, heads are inside where they are folded."""
        visible = self.prefix.visible
        if visible is None:
            return hidden
        if hidden.shape[0] % len(visible):
            self._refuse("rows with different prefixes do not lead in its logits")
        shape = [1] * hidden.ndim
        shape[0], shape[axis] = hidden.shape[0], visible.shape[1]
        seen = visible.repeat_interleave(hidden.shape[0] // len(visible), dim=0).view(shape)
        return hidden.masked_fill(~seen, -torch.inf)  # below what hides tokens: a row of padding sees nothing else

    def _longer(self, mask: Tensor) -> Tensor:
        """A mask (..., Q, K) of the longer keys."""
        count, visible = self.prefix.count, self.prefix.visible
        head = mask.new_full((*mask.shape[:-1], count), mask.dtype == torch.bool)  # True, or 0.0
        if visible is not None:
            seen = visible[:, None, None]
            head = head & seen if mask.dtype == torch.bool else head.masked_fill(~seen, -torch.inf)
            mask = mask.expand(*head.shape[:-1], mask.shape[-1])
        return torch.cat([head, mask], dim=-1)

    def _roles(self, known: dict[str, Roles], product: Product) -> Roles:
        if product.signature not in known:
            self._refuse(f"it computes an attention ({product.signature}) that the trial pass did not show")
        return known[product.signature]

    def _refuse(self, what: str) -> None:
        raise StateError(
            f"{type(self.module).__name__}: the prefix was not added, because {what}; use LoRA",
            found=type(self.module).__name__,
        )


class Mount:
    """The two hooks on a module that computes attention by itself. Copied and pickled with it."""

    def __init__(self, slot: Slot, layout: Layout) -> None:
        self.slot = slot
        self.layout = layout
        self.handles: list[Any] = []

    def put_on(self, module: nn.Module) -> Mount:
        self.handles = [
            module.register_forward_pre_hook(self.before),
            module.register_forward_hook(self.after, always_call=True),
        ]
        return self

    def take_off(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        prefix = None if attention.recorders_here() else self.slot.stage.prefix_of(self.slot.site)
        if prefix is not None:
            Grafting(module, self.layout, self.slot, prefix).__enter__()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mode = _innermost()
        if isinstance(mode, Grafting) and mode.module is module:
            mode.__exit__(None, None, None)
            if output is not None:  # None when the module raised
                mode.check()


def _with_rows(prefix: Tensor) -> Tensor:
    return prefix if prefix.ndim == 4 else prefix[None]


def _innermost() -> Any:
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode()
