"""The way of one pass of the decoder through the shadows beside it: hooks on the decoder and on its blocks.

    enter     before the decoder: s_0 of every active shadow, from the same inputs
    inject    before a block: h' = h + alpha W_up W_down (h - s)
    update    after a block: the next s
    leave     after the decoder

While text is generated the shadow needs a cache of its own. It is made of further layers at the end of the decoder's
cache, so whatever reorders, repeats, crops or resets that one does it to both.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.cache import makes_one, new_cache, own_layers
from deltatune.errors import StateError
from deltatune.selection import Call, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltatune.shadow.graft import Shadow

STAGE = "_deltatune_shadow"  # key in the __dict__ of the decoder
_READ = ("attention_mask", "position_ids", "cache_position", "token_type_ids")  # inputs that both transformers get


@dataclass(eq=False)
class Pass:
    """One pass of the decoder.

    Attributes:
        call: The adapters that were active when it began.
        first: s_0 by shadow.
        before: For each block, the states with which it was entered; kept for blocks that are computed again.
    """

    call: Call
    first: dict[str, Tensor]
    before: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.running: list[Pass | None] = []


class Stage:
    """Everything the shadows of one decoder share."""

    def __init__(self, decoder: PreTrainedModel, blocks: nn.ModuleList, selection: Selection) -> None:
        self.decoder, self.selection = decoder, selection
        self.shadows: dict[str, Shadow] = {}
        self.count = len(blocks)
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        self.local = _PerThread()
        self.latest: dict[str, Tensor] = {}
        self.handles = [
            decoder.register_forward_pre_hook(self.enter, with_kwargs=True),
            decoder.register_forward_hook(self.leave, always_call=True),
        ]
        for number, block in enumerate(blocks):
            crossing = _Hooks(self, number)
            self.handles.append(block.register_forward_pre_hook(crossing.inject, with_kwargs=True))
            self.handles.append(block.register_forward_hook(crossing.update))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        vars(self.decoder).pop(STAGE, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "local": None, "latest": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local = _PerThread()

    # ----------------------------------------------------------------------------------------------- the decoder's pass

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.selection.current()
        names = [name for name in dict.fromkeys(call.rows or call.names) if name in self.shadows]
        if not names:
            self.local.running.append(None)
            return None
        inputs = {**dict(zip(self.parameters, args)), **kwargs}
        if makes_one(self.decoder, inputs):
            inputs["past_key_values"] = new_cache(self.decoder)
        first = {}
        for name in names:
            first[name] = self._start(name, inputs)
        self.local.running.append(Pass(call, first, {0: first}))
        if module.training and not torch.compiler.is_compiling():
            self.latest = dict(first)  # for the loss of these, which is asked for after the pass
        return (), inputs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.local.running:
            self.local.running.pop()

    def _start(self, name: str, inputs: dict[str, Any]) -> Tensor:
        """s_0 of one shadow."""
        shadow = self.shadows[name]
        given = {key: inputs[key] for key in _READ if inputs.get(key) is not None and key in shadow.parameters}
        if inputs.get("inputs_embeds") is not None:
            given["inputs_embeds"] = inputs["inputs_embeds"]
        elif shadow.shares_embeddings:
            given["inputs_embeds"] = self.decoder.get_input_embeddings()(inputs["input_ids"])
        else:
            given["input_ids"] = inputs["input_ids"]
        if "inputs_embeds" in given:
            given["inputs_embeds"] = given["inputs_embeds"].to(shadow.encoder.dtype)
        cache = inputs.get("past_key_values")
        given["use_cache"] = cache is not None
        if cache is not None:
            given["past_key_values"] = own_layers(
                cache, shadow.name, shadow.encoder.shadow_backbone.config, self.decoder
            )
        return shadow.encoder(**given)

    # -------------------------------------------------------------------------------------------------- one block of it

    def current(self) -> Pass | None:
        """The pass that runs; None where no shadow takes part.

        Raises:
            StateError: A block is called on its own, or computed again by a checkpoint function that we do not know.
        """
        if self.local.running:
            return self.local.running[-1]
        call = self.selection.current()
        if not any(name in self.shadows for name in call.rows or call.names):
            return None
        raise StateError(
            "a block was called outside of a pass of its decoder, so there is no shadow state; switch checkpointing on "
            "by model.gradient_checkpointing_enable() of the PeftModel, without the reentrant engine",
            field="gradient_checkpointing",
            hint="call model.gradient_checkpointing_enable()",
        )

    @contextmanager
    def _again(self, running: Pass | None) -> Iterator[None]:
        self.local.running.append(running)
        try:
            yield
        finally:
            self.local.running.pop()

    def carried(self) -> Any:
        """What a layer that is computed again for the backward pass runs in: the pass that runs now."""
        return self._again(self.local.running[-1] if self.local.running else None)


class _Hooks:
    """The two hooks of one block."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.stage, self.number, self.key = stage, number, str(number)

    def inject(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running = self.stage.current()
        if running is None:
            return None
        h = args[0] if args else kwargs["hidden_states"]
        for name, crossing in self._crossings(running):
            h = _rows(running.call, name, h, crossing.inject(h, running.before[self.number][name]))
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    def update(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running = self.stage.current()
        if running is None:
            return
        h = output[0] if isinstance(output, tuple) else output
        states = dict(running.before[self.number])
        for name, crossing in self._crossings(running):
            states[name] = crossing.update(h, states[name])
        running.before.setdefault(self.number + 1, states)  # a block that is computed again changes nothing

    def _crossings(self, running: Pass) -> list[tuple[str, Any]]:
        networks = {name: self.stage.shadows[name].encoder.crossings for name in running.first}
        return [(name, crossings[self.key]) for name, crossings in networks.items() if self.key in crossings]


def _rows(call: Call, name: str, old: Tensor, new: Tensor) -> Tensor:
    """`new` in the rows that are an adapter's, `old` in the others."""
    if call.rows is None:
        return new
    own = torch.tensor([row == name for row in call.rows_of(len(old))], device=old.device)
    return torch.where(own.view(-1, *[1] * (old.ndim - 1)), new, old)
