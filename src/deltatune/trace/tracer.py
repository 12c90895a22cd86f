"""`trace`: one batch through an adapted model, every stop of its way noted, the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.errors import DataError, StateError
from deltatune.inject import adapted_layers
from deltatune.model import PeftModel
from deltatune.prompts.key_values import Prefix
from deltatune.prompts.sites import survey, undisturbed
from deltatune.trace import describe
from deltatune.trace.gradients import Gradients
from deltatune.trace.report import LossStop, TraceReport
from deltatune.trace.watch import Watch, where


def trace(model: PeftModel, batch: Mapping[str, Any], loss: Callable[[Any], Tensor] | None = None) -> TraceReport:
    """Run one batch forward and backward and report what happened where.

    Parameters, buffers, `.grad`, modes, hooks and the random state are afterwards what they were. The model runs in the
    mode it is in: in training mode dropout makes two traces differ.

    Args:
        model: A `PeftModel` with an active adapter that is not merged.
        batch: Keyword arguments of the model; with `labels` there is a loss, and with a loss there are gradients.
        loss: Makes a loss of the model's output, for models or batches without one of their own.

    Raises:
        StateError: The model is not adapted, or its adapters are merged or disabled.
        DataError: The batch is empty or no mapping.
    """
    names = _checked(model, batch)
    base = model.base_model.model
    device = next((p.device for p in base.parameters()), torch.device("cpu"))
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    prefixes = {name: model.prefixes[name] for name in names if name in model.prefixes}
    sites = survey(cast(Any, base)).sites if prefixes else []
    with _undisturbed(model, prefixes):
        watch = Watch(base, {name: prefix.encoder for name, prefix in prefixes.items()}, sites)
        with watch, torch.enable_grad():
            output = model(**inputs)
            value = loss(output) if loss is not None else _loss(output)
        for name, prefix in prefixes.items():
            if name not in watch.rows:  # a frozen prefix is folded once and then kept
                watch.rows[name] = prefix.encoder().detach()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = Gradients(value, [*trainable, *watch.rows.values()])
        return describe.report(model, inputs, names, watch, gradients, _loss_stop(model, base, output, value))


def _checked(model: Any, batch: Any) -> tuple[str, ...]:
    if not isinstance(model, PeftModel):
        raise StateError(
            f"trace: {type(model).__name__} is not adapted; trace what get_peft_model or PeftModel.from_pretrained "
            "returns",
            found=type(model).__name__,
            expected="PeftModel",
        )
    if not isinstance(batch, Mapping) or not batch:
        raise DataError(
            f"trace: the batch is {'empty' if isinstance(batch, Mapping) else type(batch).__name__}; expected a "
            "mapping of the model's arguments, such as {'input_ids': ..., 'labels': ...}",
            field="batch",
            expected="mapping",
        )
    if any(layer.merged for _, layer in adapted_layers(model.base_model.model)):
        raise StateError(
            "trace: adapters are merged into the base and receive nothing; call unmerge_adapter() first",
            field="adapters",
            found="merged",
            expected="unmerged",
            hint="call unmerge_adapter()",
        )
    names = model.base_model.selection.names()
    if not names:
        raise StateError(
            "trace: no adapter is active; call set_adapter(name), or enable_adapter_layers() where they are disabled",
            found=list(model.peft_config),
        )
    return names


@contextmanager
def _undisturbed(model: PeftModel, prefixes: dict[str, Prefix]) -> Iterator[None]:
    """Everything as it was afterwards; in between, the modes are those that the model is in."""
    modes = [(module, module.training) for module in model.modules()]
    stages = [(prefix.stage, prefix.stage.latest) for prefix in prefixes.values()]
    with undisturbed(cast(Any, model)):
        for module, training in modes:
            module.training = training
        try:
            yield
        finally:
            for stage, latest in stages:  # it holds the graph of the traced pass
                stage.latest = latest


def _loss(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):  # transformers' outputs are
        return output.get("loss")
    return output if isinstance(output, Tensor) and output.ndim == 0 else None


def _loss_stop(model: PeftModel, base: nn.Module, output: Any, loss: Tensor | None) -> LossStop:
    made = output.items() if isinstance(output, Mapping) else [("output", output)]
    shapes = {key: list(value.shape) for key, value in made if isinstance(value, Tensor)}
    value, note = None, ""
    if loss is None:
        note = "no loss: the batch has no labels, so nothing asks for gradients"
    elif not torch.isfinite(loss).all():
        note = f"the loss is not finite: {loss.detach().item()}"
    else:
        value = float(loss.detach())
    return LossStop(where(PeftModel.forward), where(type(base).forward), value, shapes, note)
