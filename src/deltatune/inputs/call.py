"""The arguments of one call with P virtual tokens in front, and its outputs without them.

Placeholders stand for the virtual tokens in `input_ids`, so that whatever reads ids (pooling at the last token that is
no padding, end-of-sentence masks, per-layer embeddings, positions counted from ids) finds its place; what they are
embedded as is replaced (`deltatune.inputs.stage`). The placeholder is the row's own first token (of a model that
reads images or sound too, the first of text, because it counts the others).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deltatune.errors import DataError, StateError
from deltatune.inputs.places import DECODER, ENCODER

ZERO = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "global_attention_mask")
IGNORED = -100  # a label that no loss counts
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")

_OF_ENCODER = ("encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions")
_OF_TOKENS = (
    *("logits", "start_logits", "end_logits", "last_hidden_state", "hidden_states", "attentions"),
    *("decoder_hidden_states", "decoder_attentions", "cross_attentions"),
)


@dataclass
class View:
    """What a caller sees of one call.

    Attributes:
        tokens: Number of the caller's tokens in the encoder, or in the only stack.
        targets: The same where the outputs come from: in the decoder, if there is one.
        as_tuple: The caller asked for a tuple.
        answers: Where the spans of question answering begin and end.
        loss: A loss in place of the model's, from all logits.
    """

    tokens: int
    targets: int
    as_tuple: bool = False
    answers: tuple[Tensor, Tensor] | None = None
    loss: Callable[[Tensor], Tensor] | None = None


def past_tokens(named: dict[str, Any]) -> int | Tensor | None:
    """Tokens in the cache of a call; None where there are some, but the cache does not count them."""
    for name in CACHES:
        cache = named.get(name)
        if cache is None:
            continue
        if not hasattr(cache, "get_seq_length"):
            return None
        try:
            seen = cache.get_seq_length()
        except ValueError:  # recurrent states only
            return None if cache.has_previous_state() else 0
        return seen.clone() if isinstance(seen, Tensor) else seen  # static caches count in place
    return 0


def first_token(mask: Any, ids: Tensor | None, padding: int | None = None) -> Tensor | None:
    """Index (B,) of the first token of each row that is no padding; None where that is 0 for all."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        first = (mask != 0).int().argmax(dim=1)
    elif ids is None or padding is None:
        return None
    else:
        first = (ids != padding).int().argmax(dim=1)
    return first if torch.compiler.is_compiling() or bool(first.any()) else None


def insert(values: Tensor, new: Tensor, first: Tensor | None) -> Tensor:
    """`new` (..., B, P) into `values` (..., B, T) before each row's first token, so behind padding on the left.

    A token at t stands at t + P then, wherever its row begins; what stands before that is padding and virtual tokens.
    """
    if first is None:
        return torch.cat([new, values], dim=-1)
    count, length = new.shape[-1], values.shape[-1] + new.shape[-1]
    place = torch.arange(length, device=values.device)
    start = first[:, None].to(values.device)
    number = place - start  # which virtual token; below 0 padding, from P on a token
    source = torch.where(number < 0, place, (place - count).clamp(min=0)).expand(*values.shape[:-1], -1)
    picked = new.gather(-1, number.clamp(0, count - 1).expand(*new.shape[:-1], -1))
    return torch.where((number >= 0) & (number < count), picked, values.gather(-1, source))


def lengthen_ids(ids: Tensor, count: int, first: Tensor | None, counted: tuple[int, ...] = ()) -> Tensor:
    """Placeholders before ids (B, T), none of them one of the tokens that are `counted`."""
    if ids.ndim != 2:
        raise DataError(f"input_ids has shape {tuple(ids.shape)}; a prompt needs (batch, tokens)", field="input_ids")
    if counted:
        plain = ~torch.isin(ids, torch.tensor(counted, device=ids.device))
        if first is not None:
            plain &= torch.arange(ids.shape[1], device=ids.device) >= first[:, None].to(ids.device)
        own = ids.gather(1, plain.int().argmax(dim=1, keepdim=True))
    else:
        own = ids[:, :1] if first is None else ids.gather(1, first[:, None].to(ids.device))
    return insert(ids, own.expand(-1, count), first)


def lengthen_mask(name: str, mask: Any, count: int, tokens: int, causal: bool, first: Tensor | None = None) -> Any:
    """Ones before a mask (B, T) of padding; a mask (B, 1, T, T) is lengthened on both sides where order is causal."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return insert(mask, mask.new_ones(len(mask), count), first)
    if isinstance(mask, Tensor) and mask.ndim == 4 and causal and mask.shape[2] == mask.shape[3] == tokens:
        return _square(mask, count)
    shape = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"given as {type(mask).__name__}"
    raise StateError(
        f"{name} {shape} cannot be lengthened by the virtual tokens of a prompt; pass one of shape (batch, tokens)",
        field=name,
    )


def _square(mask: Tensor, count: int) -> Tensor:
    """Every token sees the virtual ones; those see each other in order."""
    rows, heads, tokens, _ = mask.shape
    floats = mask.is_floating_point()
    seen, hidden = (0.0, torch.finfo(mask.dtype).min) if floats else (1, 0)
    prompt = torch.ones(count, count + tokens, dtype=torch.bool, device=mask.device).tril()
    top = torch.full_like(prompt, hidden, dtype=mask.dtype).masked_fill(prompt, seen)
    left = mask.new_full((rows, heads, tokens, count), seen)
    return torch.cat([top.expand(rows, heads, -1, -1), torch.cat([left, mask], dim=3)], dim=2)


def lengthen_positions(positions: Tensor, count: int, first: Tensor | None) -> Tensor:
    """The virtual tokens take the positions (..., T) from the row's first on, and the tokens follow."""
    numbers = torch.arange(count, device=positions.device)
    if first is None:
        return torch.cat([positions[..., :1] + numbers, positions + count], dim=-1)
    index = first[:, None].to(positions.device).expand(*positions.shape[:-2], -1, -1)
    positions = positions.expand(*positions.shape[:-2], len(first), -1)
    return insert(positions + count, positions.gather(-1, index) + numbers, first)


def lengthen(
    named: dict[str, Any],
    side: str,
    rows: Tensor,
    causal: bool,
    padding: int | None = None,
    counted: tuple[int, ...] = (),
) -> tuple[int, bool, Any]:
    """Put virtual tokens before the inputs of one side, in place.

    Args:
        named: The arguments of the call by name.
        rows: (P, width) or (B, P, width).
        causal: Whether tokens see earlier ones only.
        padding: Id of padding, where no mask tells it.
        counted: Tokens of which the model counts how many there are.

    Returns: The number of tokens there were, whether they came as ids, and which virtual token the first position is:
    0, or for each row minus the padding on its left.
    """
    ids, embeds, mask = (named.get(side + name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    count = rows.shape[-2]
    given = ids if ids is not None else embeds
    assert isinstance(given, Tensor)
    batch, tokens = given.shape[:2]
    first = first_token(mask, ids, padding)
    for name, value in named.items():
        _check_argument(name, value, side, batch, tokens)
    if ids is not None:
        named[side + "input_ids"] = lengthen_ids(ids, count, first, counted)
    if embeds is not None:
        new = for_rows(rows, batch).to(embeds).transpose(1, 2)
        along = None if first is None else first.repeat_interleave(embeds.shape[2])
        flat = insert(embeds.transpose(1, 2).flatten(0, 1), new.flatten(0, 1), along)
        named[side + "inputs_embeds"] = flat.unflatten(0, (batch, embeds.shape[2])).transpose(1, 2)
    if mask is not None:
        named[side + "attention_mask"] = lengthen_mask(side + "attention_mask", mask, count, tokens, causal, first)
    if (positions := named.get(side + "position_ids")) is not None:
        if mask is None and not torch.compiler.is_compiling() and (positions.diff(dim=-1) < 0).any():
            raise StateError(
                f"{side}position_ids begin anew within a row, but a prompt stands before the first sequence only; "
                "give each sequence a row of its own",
                field=side + "position_ids",
            )
        named[side + "position_ids"] = lengthen_positions(positions, count, first)
    for name in ZERO:
        if side == ENCODER and isinstance(named.get(name), Tensor):
            named[name] = functional.pad(named[name], (count, 0))
    return tokens, ids is not None, 0 if first is None else -first


_KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


def _check_argument(name: str, value: Any, side: str, batch: int, tokens: int) -> None:
    known = (*_KNOWN, *ZERO, "labels", "shift_labels", "input_type_mask")
    if side == DECODER or name in known or name.startswith(DECODER):
        return
    if isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[:2] == (batch, tokens):
        raise StateError(
            f"{name} has a value for every token, and it is not known which the virtual tokens of a prompt should "
            "have; use PrefixTuningConfig, which adds none",
            field=name,
        )


def for_rows(rows: Tensor, batch: int) -> Tensor:
    """Rows (P, width) for each of a batch; rows (B, P, width) of fewer, whose beams or samples stand side by side."""
    if rows.ndim == 2:
        return rows.expand(batch, -1, -1)
    return rows if len(rows) == batch else rows.repeat_interleave(batch // len(rows), dim=0)


def continue_side(named: dict[str, Any], side: str, count: int) -> None:
    """A call that goes on from a cache which holds the virtual tokens: only masks and positions know of them."""
    mask, positions = named.get(side + "attention_mask"), named.get(side + "position_ids")
    if mask is not None:
        named[side + "attention_mask"] = lengthen_mask(side + "attention_mask", mask, count, -1, False)
    if positions is not None:
        named[side + "position_ids"] = positions + count


def lengthen_labels(labels: Tensor, count: int) -> Tensor:
    return functional.pad(labels, (count, 0), value=IGNORED)


# --------------------------------------------------------------------------------------------------------- outputs


def shorten(output: Any, view: View) -> Any:
    """The output of a model (`ModelOutput`) with the caller's tokens only; attention weights keep their columns."""
    for name in list(output.keys()):
        length = view.tokens if name in _OF_ENCODER else view.targets
        if name in _OF_ENCODER or name in _OF_TOKENS:
            output[name] = _last(output[name], length, name)
    return output


def _last(value: Any, length: int, name: str) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_last(part, length, name) for part in value)
    if not isinstance(value, Tensor) or (name == "logits" and value.ndim < 3):
        return value
    axis = (
        1 if value.ndim == 2 else value.ndim - 2
    )  # start_logits (B, T); hidden (B, T, d); attentions (B, heads, T, K)
    return value.narrow(axis, value.shape[axis] - length, length) if value.shape[axis] > length else value


def shorten_steps(states: Any, length: int) -> Any:
    """Hidden states or attention weights, in tuples, of the last `length` tokens."""
    return _last(states, length, "")


def span_loss(start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Mean cross-entropy of where the answers begin and end; positions beyond the tokens do not count."""
    tokens = start_logits.shape[1]
    losses = [
        functional.cross_entropy(logits, spot.reshape(-1).clamp(0, tokens), ignore_index=tokens)
        for logits, spot in ((start_logits, starts), (end_logits, ends))
    ]
    return (losses[0] + losses[1]) / 2
