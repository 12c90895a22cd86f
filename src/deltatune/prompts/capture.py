"""The keys and values that the attentions of a model compute for real tokens."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import TargetError
from deltatune.prompts.example import call_with_tokens, ordinary_tokens
from deltatune.prompts.follow import Trail
from deltatune.prompts.listen import Listener
from deltatune.prompts.positions import PositionShift
from deltatune.prompts.product import Roles, canonical
from deltatune.prompts.sites import Site, undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Capture(Listener):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def record(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = self.names.get(id(module))
        if name is not None:  # the first call of a module that is called several times
            self.found.setdefault(name, (key.detach(), value.detach()))

    def record_own(
        self, module: nn.Module, queries: int, keys: Tensor, values: Tensor, trail: Trail | None, how: dict[str, Roles]
    ) -> None:
        self.record(module, keys, canonical(keys, how["keys"]), canonical(values, how["values"]))


class _Constant:
    """Stands in for a stage: the same shift in every pass."""

    def __init__(self, amount: int) -> None:
        self.amount = amount

    def shift(self) -> int:
        return self.amount


def capture(
    model: PreTrainedModel, sites: list[Site], token_ids: Tensor, first_position: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (1, heads, tokens, dim) of every site for `token_ids` (1, tokens), as attention receives them.

    Args:
        first_position: Position of the first token, as rotary angles see it. Prefixes of the model take no part.
    """
    watch = _Capture(model)
    shifting = PositionShift(_Constant(first_position), rotary_only=True)
    with undisturbed(model), torch.no_grad():
        shifting.attach(model, [site.name for site in sites])
        try:
            with watch:
                _run(model, token_ids)
        finally:
            shifting.detach()
    return [watch.found[site.name] for site in sites]


def _run(model: PreTrainedModel, token_ids: Tensor) -> None:
    try:
        call_with_tokens(model, token_ids)
    except Exception as error:  # of a model that is known by its class only: it wants more than tokens
        raise TargetError(
            f"{type(model).__name__} does not run on tokens alone ({type(error).__name__}: {error}), which starts from "
            "text and PEFT's layout need; leave them out",
            found=type(model).__name__,
        ) from error


def check_shift(model: PreTrainedModel, sites: list[Site]) -> None:
    """Raise TargetError where the hooks of `PositionShift` do not move what `position_ids` move.

    A table that the model indexes by itself is no module; moving nothing there would give numbers that mean nothing.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return
    ids, start = ordinary_tokens(model, 4), 4  # beyond the row of padding
    told = [_at(model, sites, ids, start, 0), _at(model, sites, ids, start + 3, 0), _at(model, sites, ids, start, 3)]
    for site, before, after, hooked in zip(sites, *told):
        moved, rounding = (after - before).abs().max(), 1e-3 * after.abs().max()
        if (hooked - after).abs().max() > 0.1 * moved + rounding:
            raise TargetError(
                f"{type(model).__name__}: PEFT's layout is not available, because the positions of {site.name!r} enter "
                "where they cannot be moved; use layout='native'",
                field="layout",
                found="peft",
                expected="native",
            )


def _at(model: PreTrainedModel, sites: list[Site], token_ids: Tensor, start: int, shift: int) -> list[Tensor]:
    """Keys of every site for tokens that are told to stand at `start`, with positions moved by hooks."""
    watch, shifting = _Capture(model), PositionShift(_Constant(shift))
    positions = start + torch.arange(token_ids.shape[1], device=model.device)[None]
    with undisturbed(model), torch.no_grad():
        shifting.attach(model, [site.name for site in sites])
        try:
            with watch:
                call_with_tokens(model, token_ids, position_ids=positions)
        finally:
            shifting.detach()
    return [watch.found[site.name][0].float() for site in sites]


def rows_of(pairs: list[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Rows of a prefix (count, width) from the keys and values of the first `count` tokens."""
    columns: list[Any] = []
    for pair in pairs:
        columns += [part[0, :, :count].transpose(0, 1).flatten(1).float() for part in pair]
    return torch.cat(columns, dim=1)
