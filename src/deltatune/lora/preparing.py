"""`prepare`: what any start takes from data, out of a data loader, before the adapter is there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import DataError
from deltatune.lora import prepared
from deltatune.lora.covariance import preprocess_corda
from deltatune.lora.eva import with_ranks
from deltatune.lora.explained import get_eva_state_dict
from deltatune.lora.gradients import preprocess_loraga
from deltatune.lora.inputs import forward_fn_dict, moved
from deltatune.lora.targeted import targeted

NEEDS_DATA = ("corda", "eva", "lora_ga")


def prepare(
    model: nn.Module,
    config: Any,
    dataloader: Iterable[Any],
    forward: Callable[[Any, Any], Any] = forward_fn_dict,
    batches: int | None = None,
) -> None:
    """Take from data what the start of a LoraConfig needs; `get_peft_model(model, config)` uses it.

    CorDA reads the inputs of the layers, EVA too (and sets the config's ranks and targets), LoRA-GA the gradient of the
    loss. Other starts need nothing, and the call does nothing.

    Args:
        model: The bare model; it is left as it was.
        config: A LoraConfig.
        dataloader: Batches for `forward`; for LoRA-GA with labels, so that the output has a loss.
        forward: (model, batch) -> output, by default model(**batch).
        batches: How many of the batches, all by default.

    Raises:
        DataError: There are no batches, no loss, or not enough in them.
    """
    data = dataloader if batches is None else list(itertools.islice(dataloader, batches))
    _STARTS.get(config.init_lora_weights, _nothing)(model, config, data, forward)


def _nothing(model: nn.Module, config: Any, data: Iterable[Any], forward: Callable[[Any, Any], Any]) -> None:
    return None


def _corda(model: nn.Module, config: Any, data: Iterable[Any], forward: Callable[[Any, Any], Any]) -> None:
    preprocess_corda(model, config, lambda: [forward(model, batch) for batch in _here(model, data)].clear())


def _lora_ga(model: nn.Module, config: Any, data: Iterable[Any], forward: Callable[[Any, Any], Any]) -> None:
    def step() -> None:
        for batch in _here(model, data):
            _loss(forward(model, batch)).backward()

    preprocess_loraga(model, config, step)


def _eva(model: nn.Module, config: Any, data: Iterable[Any], forward: Callable[[Any, Any], Any]) -> None:
    layers = targeted(model, config, "eva", frozenset({"linear"}), others=True)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):  # whose layers see one text or the other
        components = get_eva_state_dict(model, data, config, forward, None, None)
    else:
        components = get_eva_state_dict(model, data, config, forward)
    changed = with_ranks(config, {path: len(A) for path, A in components.items()}, list(layers))
    for path, A in components.items():
        prepared.leave(layers[path].module, "eva", {"A": A})
    vars(config).update(vars(changed))


_STARTS: dict[Any, Callable[..., None]] = {"corda": _corda, "lora_ga": _lora_ga, "eva": _eva}


def _here(model: nn.Module, data: Iterable[Any]) -> Iterable[Any]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return (moved(batch, device) for batch in data)


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise DataError(
            "prepare: LoRA-GA needs a loss, and the output has none; give the batches labels",
            field="labels",
            found=type(output).__name__,
            expected="an output with a loss",
        )
    return loss
