"""What one forward pass of a model with prompts is called with: inputs, masks, positions and labels, lengthened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune.config import TaskType
from deltatune.errors import DataError, StateError
from deltatune.inputs.call import View, continue_side, lengthen, lengthen_labels, past_tokens
from deltatune.inputs.places import DECODER, ENCODER

if TYPE_CHECKING:
    from deltatune.inputs.prompt import Input
    from deltatune.inputs.stage import InputStage


@dataclass(eq=False)
class Pass:
    """One forward pass of the base.

    Attributes:
        rows: What the embedding is to put before the tokens of each side, (P, width) or (B, P, width).
        starts: Which virtual token the first position of each side is, for all or for each row (B,); below 0 where
            tokens or padding stand before them.
        view: What the caller sees; None where nothing is cut off.
        met: Sides whose embedding ran.
    """

    rows: dict[str, Tensor]
    starts: dict[str, Any]
    view: View | None = None
    met: list[str] = field(default_factory=list)


def lengthened(stage: InputStage, named: dict[str, Any], prompts: list[Input], task_ids: Any) -> Pass:
    """Lengthen the arguments of a call, in place."""
    given, targets = _given(named, ENCODER), _given(named, DECODER)
    batch = next((len(tensor) for tensor in (given, targets) if tensor is not None), 1)
    rows = stage.rows(prompts, task_ids, batch)
    count = rows[ENCODER].shape[-2]
    seen = past_tokens(named)
    goes_on = seen is None or bool(seen > 0)
    if goes_on and not stage.places.stacks:  # the cache holds the virtual tokens
        continue_side(named, ENCODER, count)
        return Pass({}, {})
    view = View(0, 0, as_tuple=_wants_tuple(stage, named))
    running = Pass(rows, {ENCODER: 0, DECODER: 0}, view)
    if given is None:
        _pad_encoded(named, count, goes_on)
        running.rows = {side: part for side, part in rows.items() if side != ENCODER}
    else:
        _check_length(stage, count + given.shape[1])
        view.tokens, as_ids, running.starts[ENCODER] = lengthen(
            named, ENCODER, rows[ENCODER], stage.causal, counted=stage.places.counted
        )
        if not as_ids:  # they stand before `inputs_embeds` already
            running.rows = {side: part for side, part in rows.items() if side != ENCODER}
    if stage.places.stacks:
        _lengthen_targets(stage, named, running, rows, targets, goes_on)
    else:
        view.targets = view.tokens
        _lengthen_labels(named, view, prompts, batch, count)
    if named.get("start_positions") is not None and named.get("end_positions") is not None:
        view.answers = (named.pop("start_positions"), named.pop("end_positions"))
    keep = named.get("logits_to_keep")
    if isinstance(keep, Tensor):
        named["logits_to_keep"] = torch.where(keep >= 0, keep + count, keep)
    named["return_dict"] = True
    return running


def _given(named: dict[str, Any], side: str) -> Tensor | None:
    ids = named.get(side + "input_ids")
    return named.get(side + "inputs_embeds") if ids is None else ids


def _wants_tuple(stage: InputStage, named: dict[str, Any]) -> bool:
    wanted = named.get("return_dict")
    return not (getattr(stage.model.config, "return_dict", True) if wanted is None else wanted)


def _check_length(stage: InputStage, length: int) -> None:
    limit = stage.places.limit
    if limit is not None and length > limit:
        raise DataError(
            f"{type(stage.model).__name__} has {limit} positions, but tokens and virtual tokens are {length}; "
            f"shorten the input by {length - limit} tokens",
            field="input_ids",
            found=length,
            expected=limit,
        )


def _lengthen_labels(named: dict[str, Any], view: View, prompts: list[Input], batch: int, count: int) -> None:
    """A label of every token gets company; labels of whole rows stay."""
    own: list[Any] = [prompt.encoder for prompt in prompts if hasattr(prompt.encoder, "context_loss")]
    types = named.pop("input_type_mask", None) if own else None
    if own and named.get("labels") is not None:
        view.loss = own[0].context_loss([prompt.encoder for prompt in prompts], named.pop("labels"), types)
    by_row = any(prompt.config.task_type == TaskType.SEQ_CLS for prompt in prompts)
    for name in ("labels", "shift_labels"):
        value = named.get(name)
        if not isinstance(value, Tensor) or value.is_floating_point() or by_row:
            continue
        if value.shape == (batch, view.tokens):
            named[name] = lengthen_labels(value, count)


def _lengthen_targets(
    stage: InputStage,
    named: dict[str, Any],
    running: Pass,
    rows: dict[str, Tensor],
    targets: Tensor | None,
    goes_on: bool,
) -> None:
    """The decoder's side of an encoder-decoder."""
    view, own, labels = running.view, rows.get(DECODER), named.get("labels")
    assert view is not None
    sequence = stage.model.can_generate() and isinstance(labels, Tensor) and labels.ndim == 2
    if goes_on:
        view.targets = 1 if targets is None else targets.shape[1]
        running.rows = {side: part for side, part in running.rows.items() if side != DECODER}
        if own is not None:
            continue_side(named, DECODER, own.shape[-2])
    elif targets is None and not sequence:  # a classifier: its decoder reads the encoder's ids, shifted by one
        view.targets, running.starts[DECODER] = view.tokens, running.starts[ENCODER] - 1
        if ENCODER in running.rows:
            running.rows[DECODER] = rows[ENCODER]
    elif own is None:
        view.targets = labels.shape[1] if targets is None else targets.shape[1]  # type: ignore[union-attr]
    else:
        if targets is None:
            named["decoder_input_ids"] = _targets_of(stage, labels)
        view.targets, as_ids, running.starts[DECODER] = lengthen(named, DECODER, own, True)
        if not as_ids:
            running.rows = {side: part for side, part in running.rows.items() if side != DECODER}
        if sequence:
            named["labels"] = lengthen_labels(labels, own.shape[-2])  # type: ignore[arg-type]


def _targets_of(stage: InputStage, labels: Any) -> Tensor:
    shift = getattr(stage.model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise DataError(
            f"{type(stage.model).__name__} does not tell how it makes decoder_input_ids of labels; pass both",
            field="decoder_input_ids",
        )
    return shift(labels=labels)


def _pad_encoded(named: dict[str, Any], count: int, goes_on: bool) -> None:
    """`encoder_outputs` carry no prompt, but a cache that is handed along holds all that is read of them."""
    outputs = named.get("encoder_outputs")
    if outputs is None:
        return
    if not goes_on:
        raise StateError(
            "encoder_outputs were computed without the virtual tokens of the prompt; pass input_ids",
            field="encoder_outputs",
        )
    hidden = outputs[0]
    named["encoder_outputs"] = (torch.cat([hidden.new_zeros(len(hidden), count, hidden.shape[2]), hidden], dim=1),)
    continue_side(named, ENCODER, count)
