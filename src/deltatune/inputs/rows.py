"""A batch whose rows have different prompts: each adapter's rows run together, their outputs are put in order again.

Prompts differ in length, so one pass would need padding between prompt and tokens, which shifts positions; groups of
rows need nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deltatune.config import TaskType
from deltatune.errors import DataError, StateError
from deltatune.inputs import INPUT
from deltatune.inputs.call import CACHES, IGNORED, span_loss
from deltatune.inputs.prompt import Input
from deltatune.names import BASE
from deltatune.selection import Call

_UNEQUAL = ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions", *CACHES)


def mixes_prompts(model: Any, names: Sequence[str | None] | None) -> bool:
    return any(isinstance(model.prompts.get(name), Input) for name in names or ())


def forward(model: Any, names: Sequence[str | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The base model's forward, each row with its own adapter."""
    base = model.base_model.model
    named = vars(base)[INPUT].named(args, kwargs)
    if any(named.get(name) is not None for name in CACHES) or named.get("use_cache") or named.get("output_attentions"):
        raise StateError(
            "adapter_names: rows with prompts of different lengths share neither a cache nor attention weights; leave "
            "past_key_values, use_cache and output_attentions out, or run one batch per prompt",
            field="adapter_names",
        )
    if "use_cache" in vars(base)[INPUT].parameters:
        named["use_cache"] = False
    as_tuple = named.get("return_dict") is False
    spans = [named.pop(name, None) for name in ("start_positions", "end_positions")]
    groups = _groups(model, names, named)
    outputs, weights = [], []
    for name, index, part in groups:
        with model.base_model.selection.use(model.informed(Call((name,) if name is not None else ()), part)):
            outputs.append(base(**{**part, "return_dict": True}))
        weights.append(_counted(model, name, part, len(index)))
    order = torch.cat([index for _, index, _ in groups]).argsort()
    joined = _joined(outputs, order)
    if spans[0] is not None and spans[1] is not None:
        joined["loss"] = span_loss(joined.start_logits, joined.end_logits, *spans)
    elif outputs[0].get("loss") is not None:
        joined["loss"] = _loss([output.loss for output in outputs], weights, named)
    joined = type(joined)(**{"loss": joined.get("loss"), **dict(joined.items())})  # the loss is the first field
    return joined.to_tuple() if as_tuple else joined


def generate(model: Any, names: Sequence[str | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The base model's generate, each row with its own adapter; shorter answers are padded."""
    if args:
        kwargs = {"input_ids": args[0], **kwargs}
    if kwargs.get("return_dict_in_generate") or kwargs.get("streamer") is not None:
        raise StateError(
            "adapter_names: rows with different prompts are generated in groups; leave return_dict_in_generate and "
            "streamer out, or run one batch per prompt",
            field="adapter_names",
        )
    stage = vars(model.base_model.model)[INPUT]
    groups = _groups(model, names, {("input_ids" if key == "inputs" else key): v for key, v in kwargs.items()})
    found = []
    for name, _, part in groups:
        with model.base_model.selection.use(model.informed(Call((name,) if name is not None else ()), part, part)):
            found.append(stage.generate(**part))
    settings = kwargs.get("generation_config") or model.base_model.model.generation_config
    padding = kwargs.get("pad_token_id", getattr(settings, "pad_token_id", None)) or 0
    longest = max(part.shape[1] for part in found)
    padded = torch.cat([functional.pad(part, (0, longest - part.shape[1]), value=padding) for part in found])
    each = len(padded) // len(names)
    order = torch.cat([index for _, index, _ in groups]).argsort()
    return padded.unflatten(0, (len(names), each))[order.to(padded.device)].flatten(0, 1)


def _groups(
    model: Any, names: Sequence[str | None], named: dict[str, Any]
) -> list[tuple[str | None, Tensor, dict[str, Any]]]:
    """(adapter, its rows, its part of the arguments), in the order of first use."""
    rows = [None if name in (BASE, None) else name for name in names]
    model._known([name for name in rows if name is not None])
    if isinstance(named.get("task_ids"), (list, tuple)):
        named = {**named, "task_ids": torch.tensor(named["task_ids"])}
    inputs = next((named[n] for n in ("input_ids", "inputs_embeds") if named.get(n) is not None), None)
    if inputs is not None and len(inputs) != len(rows):
        raise DataError(
            f"adapter_names has {len(rows)} names for {len(inputs)} rows; give one name per row",
            field="adapter_names",
            found=len(rows),
            expected=len(inputs),
        )
    made = []
    for name in dict.fromkeys(rows):
        index = torch.tensor([i for i, other in enumerate(rows) if other == name])
        pick = _picker(index, len(rows))
        made.append((name, index, {key: pick(value) for key, value in named.items()}))
    return made


def _picker(index: Tensor, batch: int) -> Callable[[Any], Any]:
    def pick(value: Any) -> Any:
        per_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
        return value[index.to(value.device)] if per_row else value

    return pick


def _joined(outputs: list[Any], order: Tensor) -> Any:
    first = outputs[0]
    kept = {
        key: _put_together([output[key] for output in outputs], order)
        for key in list(first)
        if key != "loss" and key not in _UNEQUAL and first[key] is not None
    }
    return type(first)(**kept)


def _put_together(parts: list[Any], order: Tensor) -> Any:
    if isinstance(parts[0], (tuple, list)):
        return tuple(_put_together(list(group), order) for group in zip(*parts))
    return torch.cat(parts)[order.to(parts[0].device)]


def _counted(model: Any, name: str | None, part: dict[str, Any], rows: int) -> Tensor | int:
    """How many labels the loss of a group is the mean of."""
    labels = part.get("labels")
    config = next(iter(model.peft_config.values())) if name is None else model.peft_config[name]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return rows
    if config.task_type == TaskType.CAUSAL_LM and not isinstance(model.prompts.get(name), Input):
        labels = labels[:, 1:]  # nothing stands before the first token, to say it
    return (labels != IGNORED).sum()


def _loss(losses: list[Tensor], weights: list[Any], named: dict[str, Any]) -> Tensor:
    if named.get("num_items_in_batch") is not None:  # then each is a sum over that number
        return torch.stack(losses).sum()
    total = sum(weights)
    return torch.stack([loss * weight / total for loss, weight in zip(losses, weights) if weight > 0]).sum()


__all__ = ["forward", "generate", "mixes_prompts"]
