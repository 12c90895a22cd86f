"""What the methods of the active adapters ask for in a training step: terms of the loss, data, a schedule's turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import inject
from deltatune.config import PeftConfig
from deltatune.notice import warn
from deltatune.prompts.graft import Graft
from deltatune.registry import METHODS
from deltatune.schedule import Schedule
from deltatune.selection import Selection


class Stepping(nn.Module):
    """The part of a `Tuner` that training steps call.

    Attributes:
        schedules: Of the adapters that have one.
        grafts: The adapters that act outside of single layers; the PeftModel's dict.
        loss_given: By the last training pass, and so with the penalty in it.
        penalty_due: Whether a training pass gave no loss that the penalty could have been added to; None once that is
            settled.
        begun: The adapters that have been trained.
    """

    model: nn.Module
    selection: Selection
    peft_config: dict[str, PeftConfig]

    def __init__(self) -> None:
        super().__init__()
        self.schedules: dict[str, Schedule] = {}
        self.grafts: dict[str, Graft] = {}
        self.loss_given = True
        self.penalty_due: bool | None = False
        self.begun: set[str] = set()

    def penalty(self, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor | None:
        """The extra loss of the active adapters that train, None where their methods have none.

        A training pass adds it to `outputs.loss` by itself. A loop that computes its own loss from the logits adds it.

        Args:
            labels: Those of the pass that has just ended, for methods whose extra loss is one of the task.
            attention_mask: Likewise.
        """
        self.penalty_due = None
        return self._penalty({"labels": labels, "attention_mask": attention_mask})

    def _penalty(self, inputs: Mapping[str, Any]) -> Tensor | None:
        call, total = self.selection.current(), None
        names = {name for name in call.rows or call.names if name}
        kinds = {name: METHODS[self.peft_config[name].peft_type].adapter for name in names}  # type: ignore[index]
        plain = {name for name, kind in kinds.items() if kind is None or not kind.penalises(self.peft_config[name])}
        terms = []
        for _, layer in inject.adapted_layers(self.model) if names - plain else ():
            for adapter in [layer.adapters[name] for name in names - plain if name in layer.adapters]:
                trained = next((p for p in adapter.parameters() if p.requires_grad), None)
                if trained is not None:
                    with torch.autocast(trained.device.type, enabled=False):
                        terms.append(adapter.penalty())  # type: ignore[operator]
        for name in names & self.grafts.keys():
            graft = self.grafts[name]
            if any(p.requires_grad for p in graft.encoder.parameters()):
                terms.append(graft.penalty(self.model, inputs.get("labels"), inputs.get("attention_mask")))
        for term in terms:
            if term is not None:
                total = term if total is None else total + term.to(total)
        return total

    def with_penalty(self, outputs: Any, inputs: Mapping[str, Any]) -> Any:
        """The outputs of a training pass with these inputs, the penalty added to their loss."""
        loss: Tensor | None = getattr(outputs, "loss", None)
        as_tuple = isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor) and outputs[0].ndim == 0
        self.loss_given = bool(isinstance(loss, Tensor) or as_tuple)
        if not isinstance(loss, Tensor) and not as_tuple:
            if self.penalty_due is False:
                self.penalty_due = self._penalty({}) is not None
            return outputs
        term = self._penalty(inputs)
        if term is None:
            return outputs
        if loss is None:
            return (outputs[0] + term.to(outputs[0]), *outputs[1:])
        outputs.loss = loss + term.to(loss)  # type: ignore[attr-defined]
        return outputs

    def check_starts(self) -> None:
        """In the first training pass of an adapter: say so if its start needs data that it has not got."""
        names = () if torch.compiler.is_compiling() else self.selection.active
        for name in [name for name in names if name not in self.begun]:
            self.begun.add(name)
            if not isinstance(getattr(self.peft_config.get(name), "init_lora_weights", None), str):
                continue  # the others begin without data, and need no walk over the layers
            held = (layer.adapters[name] for _, layer in inject.adapted_layers(self.model) if name in layer.adapters)
            if any(getattr(adapter, "awaits_data", False) for adapter in held):
                init = self.peft_config[name].init_lora_weights  # type: ignore[attr-defined]
                warn(
                    f"adapter {name!r} has init_lora_weights={init!r} and has seen no data, so it trains as plain "
                    "LoRA; call initialize_lora_eva_weights(model, dataloader) before the first step, or "
                    "deltatune.lora.prepare(base, config, dataloader) before get_peft_model"
                )

    def after_step(self, step: int | None = None) -> None:
        """After every optimizer step, before its gradients are cleared: the schedules of the adapters that train.

        Nothing happens where no active method has one. Counts the steps itself, from 1; `step` sets the count.
        """
        for name in self.selection.active:
            if name in self.schedules and self.schedules[name].trains:
                self.schedules[name].advance(step)
        if self.penalty_due:
            self.penalty_due = None
            warn(
                "the outputs of this training pass held no loss, so the penalty of the adapter's method is in none; "
                "add model.penalty() to your own loss"
            )

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's name of `after_step(global_step)`."""
        self.after_step(global_step)
