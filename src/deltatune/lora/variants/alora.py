"""aLoRA: LoRA that acts from the last occurrence of its invocation tokens on.   https://arxiv.org/abs/2504.12397

Before them the model is the base to the bit, so that keys and values in a cache are those of the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune import checks
from deltatune.adapter import LinearMap
from deltatune.calls import Value
from deltatune.errors import ConfigError, DataError, StateError
from deltatune.lora.variants.variant import Pass, Variant

if TYPE_CHECKING:
    from deltatune.methods.lora import LoRA

OFFSETS = "alora_offsets"


@dataclass(frozen=True)
class Invoked:
    """(model, arguments of a pass, what was given) -> (B, T), true from the last occurrence of `tokens` on.

    Given are tokens to be counted from the end, (B,), zero for a row that is not invoked; or the prompt (B, P) of a
    generation, of which the pass has some columns. None where a row cannot be told: no token ids, or earlier tokens
    that are in a cache only.
    """

    tokens: tuple[int, ...]

    def __call__(self, model: nn.Module, named: dict[str, Any], given: Tensor | None) -> Tensor | None:
        ids = next((named[name] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None), None)
        if not isinstance(ids, Tensor):
            return None
        from deltatune.inputs.call import past_tokens  # which brings what prompts need, of no use to other LoRA

        length, past = ids.shape[1], past_tokens(named)
        column = torch.arange(length, device=ids.device)
        if given is not None and given.ndim == 1:
            return column >= length - given.to(ids.device)[:, None]
        if given is not None:
            past = max(given.shape[1] - length, 0) if past is None else past
            return past + column >= self.start(given.to(ids.device))[:, None]
        if ids.is_floating_point():
            return None
        start = self.start(ids)
        known = isinstance(past, int) and past == 0
        return column >= start[:, None] if known or bool((start < length).all()) else None

    def start(self, ids: Tensor) -> Tensor:
        """(B,): the column in which the last occurrence begins; a number beyond all columns where there is none."""
        wanted = torch.tensor(self.tokens, device=ids.device)
        if ids.shape[1] < len(wanted):
            return ids.new_full((len(ids),), NOWHERE, dtype=torch.long)
        here = (ids.unfold(1, len(wanted), 1) == wanted).all(dim=-1)  # (B, T - n + 1)
        column = torch.arange(here.shape[1], device=ids.device)
        last = torch.where(here, column, -1).amax(dim=1)
        return torch.where(last < 0, NOWHERE, last)


NOWHERE = 2**40


def _model(model: nn.Module) -> tuple[nn.Module, ...]:
    return (model,)


def _prompt(model: nn.Module, named: dict[str, Any]) -> Tensor | None:
    found = (named[name] for name in ("inputs", "input_ids") if named.get(name) is not None)
    ids = next(found, None)
    ids = ids[None] if isinstance(ids, Tensor) and ids.ndim == 1 else ids
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def value_of(tokens: tuple[int, ...]) -> Value:
    return Value(f"invoked_{'_'.join(map(str, tokens))}", OFFSETS, _model, Invoked(tokens), _prompt, of_ids=True)


class Activated(Variant):
    """Nothing more is trained."""

    field: ClassVar[str] = "alora_invocation_tokens"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})
    summand: ClassVar[bool | str] = "it acts on some tokens and not on others"
    mergeable: bool | str = "it acts behind its invocation tokens only"
    pointwise: bool | str = "it acts behind its invocation tokens only"

    def __init__(self, tokens: tuple[int, ...]) -> None:
        super().__init__()
        self.value = value_of(tokens)
        self.reads = (self.value,)

    @classmethod
    def check(cls, config: Any) -> None:
        tokens = config.alora_invocation_tokens
        if not tokens or any(token < 0 for token in tokens):
            checks.refuse("LoraConfig", cls.field, tokens, "one or more token ids")
        if config.task_type == "SEQ_2_SEQ_LM":
            raise ConfigError(
                "LoraConfig: alora_invocation_tokens needs a model whose tokens see earlier ones only, and "
                "task_type='SEQ_2_SEQ_LM' has an encoder; leave one of the two out",
                field=cls.field,
                found=tokens,
            )

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str, r: int) -> Activated:
        return cls(tuple(config.alora_invocation_tokens))

    def output(self, out: Tensor, at: Pass, lora: LoRA) -> Tensor:
        invoked = at.values.get(self.value.name)
        if invoked is None:
            raise DataError(
                "aLoRA looks for its invocation tokens in the input_ids of the model. This pass has none, or earlier "
                f"tokens are in a cache; pass {OFFSETS}=[...], for each row how many of its tokens, counted from the "
                "end, it acts on (0 for none)",
                field=OFFSETS,
            )
        return torch.where(_fitted(invoked.to(out.device), out)[..., None], out, at.y)


def _fitted(invoked: Tensor, out: Tensor) -> Tensor:
    """Columns of the layer's tokens: the last ones of the pass, behind virtual tokens if there are more."""
    if out.ndim == 2:  # a pooled state
        return invoked[:, -1]
    if out.ndim != 3:
        raise StateError(
            f"aLoRA adapts layers that are called with (B, T, ...), not with an output of {tuple(out.shape)}; "
            "take this layer out of target_modules",
            field="target_modules",
            found=tuple(out.shape),
        )
    more = out.shape[1] - invoked.shape[1]
    return functional.pad(invoked, (more, 0)) if more > 0 else invoked[:, -more:]
