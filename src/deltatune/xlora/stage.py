"""The way of one pass: a first pass of the model gives hidden states, the classifier weights, and layers read those.

enter     before the model: the first pass and the classifier, for every active mixture
weights   asked for by the experts of a layer
leave     after the model

While text is generated the first pass needs a cache of its own: further layers at the end of the model's cache.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.cache import makes_one, new_cache, own_layers
from deltatune.errors import StateError
from deltatune.inputs import INPUT
from deltatune.selection import Call, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltatune.xlora.graft import Mixture

STAGE = "_deltatune_xlora"  # key in the __dict__ of the model
Weights = dict[str, Tensor]  # by mixture: (B, T, layers, experts)
_NOT_FIRST = ("output_hidden_states", "output_attentions", "return_dict")


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.running: list[Weights] = []
        self.first = False  # a first pass is on its way


class Stage:
    """Everything the mixtures of one model share."""

    def __init__(self, model: PreTrainedModel, selection: Selection) -> None:
        self.model, self.selection = model, selection
        self.mixtures: dict[str, Mixture] = {}
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.body: Any = model.base_model  # without the head, whose logits nobody would read in the first pass
        own = inspect.signature(self.body.forward).parameters.values()
        self.read = {"**" if part.kind is part.VAR_KEYWORD else part.name for part in own}
        self.local = _PerThread()
        self.handles = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        vars(self.model).pop(STAGE, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local = _PerThread()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.local.first:
            return None
        call = self.selection.current()
        names = [name for name in dict.fromkeys(call.rows or call.names) if name in self.mixtures]
        if not names:
            self.local.running.append({})
            return None
        self._refuse_virtual_tokens(call)
        inputs = {**dict(zip(self.parameters, args)), **kwargs}
        if "past_key_values" in self.parameters and makes_one(self.model, inputs):
            inputs["past_key_values"] = new_cache(self.model)
        weights = {}
        for name in names:
            found = self.mixtures[name].weigh(self._first_pass(name, inputs))
            if call.rows is not None:  # a layer gets the rows of each adapter by themselves
                own = [row == name for row in call.rows_of(len(found))]
                found = found[torch.tensor(own, device=found.device)]
            weights[name] = found
        self.local.running.append(weights)
        return (), inputs

    def _refuse_virtual_tokens(self, call: Call) -> None:
        present = vars(self.model).get(INPUT)
        virtual = [name for name in call.rows or call.names if present is not None and name in present.prompts]
        if virtual:
            raise StateError(
                f"adapter {virtual[0]!r} puts virtual tokens before the input, for which X-LoRA has no weights; "
                "activate one of the two",
                field="adapter_name",
                found=virtual,
            )

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.local.running and not self.local.first:
            self.local.running.pop()

    def _first_pass(self, name: str, inputs: dict[str, Any]) -> Tensor:
        """The last hidden states of the base, or of the base with all experts at one weight."""
        mixture = self.mixtures[name]
        value = mixture.config.scaling_pass_value
        given = {key: part for key, part in inputs.items() if key not in _NOT_FIRST and self._read(key)}
        if "past_key_values" in self.parameters:
            cache = given.get("past_key_values")
            given["use_cache"] = cache is not None
            given["past_key_values"] = None if cache is None else own_layers(cache, name, self.model.config, self.model)
        like = next(mixture.encoder.layers.parameters())
        constant = torch.full((1, 1, mixture.encoder.adapted, mixture.encoder.experts), value).to(like)
        running = self.local.running
        self.local.first, self.local.running = True, [{name: constant}]
        call = self.selection.current()
        # a choice of its own is what the compiler could not follow
        others = call.rows is not None or call.names != (name,) or bool(call.values)
        try:
            with torch.no_grad(), self.selection.use(Call((name,) if value else ())) if others else nullcontext():
                return self.body(**given, return_dict=True).last_hidden_state
        finally:
            self.local.first, self.local.running = False, running

    def _read(self, key: str) -> bool:
        """Whether an input of the model is one of its body: by name, or as what the model hands on unread."""
        return key in self.read or ("**" in self.read and key not in self.parameters)

    def weights(self, name: str, path: str) -> Tensor:
        """The weights of this pass.

        Raises:
            StateError: The layer is called outside of a pass of the model.
        """
        if self.local.running and name in self.local.running[-1]:
            return self.local.running[-1][name]
        raise StateError(
            f"{path} was called outside of a pass of {type(self.model).__name__}, so there are no weights for its "
            "experts; switch checkpointing on by model.gradient_checkpointing_enable() of the PeftModel, without the "
            "reentrant engine",
            path=path,
        )

    @contextmanager
    def _again(self, running: Weights) -> Iterator[None]:
        self.local.running.append(running)
        try:
            yield
        finally:
            self.local.running.pop()

    def carried(self) -> Any:
        """What a layer that is computed again for the backward pass runs in: the weights of now."""
        return self._again(self.local.running[-1] if self.local.running else {})
