"""Which tokens of a pass are those of the prompt, and which are padding, for adapters that look at whole rows.

The prompt is what generation starts from. In a pass with labels it is what stands before the first token that counts
for the loss, or all of a row that has no such part; without labels, or where the model does not generate, it is the
whole row. Behind a cache nothing is, unless generate began with a longer prompt. The caller can say it instead: ones at
the prompt's tokens (B, T), as `prompt_mask`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.calls import Value
from deltatune.inputs.call import IGNORED, past_tokens


def _two_sided(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _readers(model: Any) -> tuple[nn.Module, ...]:
    """The model, and its encoder, which generate calls on its own."""
    if not hasattr(model, "can_generate"):  # no model of transformers: its layers know no tokens but their own
        return ()
    return (model, model.get_encoder()) if _two_sided(model) else (model,)


def _writers(model: Any) -> tuple[nn.Module, ...]:
    return (model,) if hasattr(model, "can_generate") and _two_sided(model) else ()


def numbered(prompt: Tensor) -> Tensor:
    """(B, P) true at the prompt's tokens -> (B, P, 2): their number from the first and from the last; elsewhere -1."""
    count = prompt.long().cumsum(dim=1)
    numbers = torch.stack([count - 1, count[:, -1:] - count], dim=-1)
    return numbers.masked_fill(~prompt[..., None], -1)


def _window(numbers: Tensor, start: int | Tensor, length: int) -> Tensor:
    """Columns of a pass that begins at `start`; those behind the prompt are none of its tokens."""
    if isinstance(start, int) and start >= numbers.shape[1]:
        return numbers.new_zeros(1, 0, 2)  # nothing, which adapters see without looking at numbers
    column = start + torch.arange(length, device=numbers.device)
    inside = column < numbers.shape[1]
    return numbers[:, column.clamp(max=numbers.shape[1] - 1)].masked_fill(~inside[:, None], -1)


def _given_mask(named: dict[str, Any], name: str = "attention_mask") -> Tensor | None:
    mask = named.get(name)
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _ids(named: dict[str, Any], side: str = "") -> Tensor | None:
    found = [named.get(side + name) for name in ("input_ids", "inputs_embeds")]
    return next((ids for ids in found if isinstance(ids, Tensor)), None)


def _places(model: Any, named: dict[str, Any], given: Tensor | None) -> Tensor | None:
    ids, mask = _ids(named), _given_mask(named)
    ids = mask if ids is None else ids  # the encoder has run already
    if ids is None:
        return None
    start, length = 0 if _two_sided(model) else past_tokens(named), ids.shape[1]
    if start is None:  # a cache that does not count
        start = length if mask is None else mask.shape[1] - length
    if given is not None:
        return _window(numbered(given.to(ids.device) != 0), start, length)
    if start != 0:
        return ids.new_zeros(1, 0, 2, dtype=torch.long)
    prompt = torch.ones(1, length, dtype=torch.bool, device=ids.device) if mask is None else mask[:, :length]
    labels = None if _two_sided(model) else named.get("labels")
    if isinstance(labels, Tensor) and labels.shape == ids.shape[:2] and model.can_generate():
        before = prompt & ((labels != IGNORED).cumsum(dim=1) == 0)
        prompt = torch.where(before.any(dim=1, keepdim=True), before, prompt)
    return numbered(prompt)


def _decoder_places(model: Any, named: dict[str, Any], given: Tensor | None) -> Tensor | None:
    """A decoder behind an encoder starts from one token, or from more that `decoder_input_ids` of generate give."""
    ids, labels = _ids(named, "decoder_"), named.get("labels")
    labels = labels if isinstance(labels, Tensor) and labels.ndim == 2 else None
    if ids is None and labels is None:
        return None
    shown: Any = labels if ids is None else ids
    start, length = past_tokens(named), shown.shape[1]
    if given is None:
        column = torch.arange(length, device=shown.device)
        prompt = (column == 0)[None] if labels is None else (labels != IGNORED).cumsum(dim=1).roll(1, 1) == 0
        prompt = prompt | (column == 0)
        given = prompt if start == 0 else column.new_ones(1, 1)
    return _window(numbered(given.to(shown.device) != 0), length if start is None else start, length)


def _prompt_of(model: Any, named: dict[str, Any]) -> Tensor | None:
    """What generate starts from, padding left out as generate itself does."""
    ids = named.get("inputs") if named.get("inputs") is not None else _ids(named)
    if not isinstance(ids, Tensor) or (mask := _given_mask(named)) is not None:
        return mask if isinstance(ids, Tensor) else None
    config = named.get("generation_config") or model.generation_config
    padding, end = config.pad_token_id, config.eos_token_id
    if ids.ndim != 2 or padding is None or padding in (end if isinstance(end, list) else [end]):
        return torch.ones(1, ids.shape[1], dtype=torch.bool, device=ids.device)
    return ids != padding


def _decoder_prompt_of(model: Any, named: dict[str, Any]) -> Tensor | None:
    ids = named.get("decoder_input_ids")
    if not _two_sided(model) or not isinstance(ids, Tensor):
        return None
    config = named.get("generation_config") or model.generation_config
    starts = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    added = int(bool((ids[:, 0] != starts).all()))  # as generate itself does
    return torch.ones(1, ids.shape[1] + added, dtype=torch.bool, device=ids.device)


def _tokens(model: Any, named: dict[str, Any], given: Tensor | None) -> Tensor | None:
    ids = _ids(named)
    return _cut(
        _given_mask(named) if given is None else given != 0, ids, 0 if _two_sided(model) else past_tokens(named)
    )


def _decoder_tokens(model: Any, named: dict[str, Any], given: Tensor | None) -> Tensor | None:
    mask = _given_mask(named, "decoder_attention_mask")
    return _cut(mask if given is None else given != 0, _ids(named, "decoder_"), past_tokens(named))


def _cut(mask: Tensor | None, ids: Tensor | None, start: int | Tensor | None) -> Tensor | None:
    """The columns of a mask that are those of a pass; all, where that passes no tokens."""
    if mask is None or ids is None or not isinstance(start, int) or mask.shape[1] < start + ids.shape[1]:
        return mask if ids is None else None
    return mask[:, start : start + ids.shape[1]]


def sees_targets(path: str) -> bool:
    """Whether a layer sees the tokens of a decoder: all in it do but the keys and values of its cross-attentions."""
    parts = path.split(".")
    cross = any(re.search("cross|enc_?dec|encoder_att", part, re.IGNORECASE) for part in parts)
    return "decoder" in parts and not (cross and parts[-1][0] in "kv")


PLACES = Value("places", "prompt_mask", _readers, _places, _prompt_of)
DECODER_PLACES = Value("decoder_places", "decoder_prompt_mask", _writers, _decoder_places, _decoder_prompt_of)
TOKENS = Value("tokens", "token_mask", _readers, _tokens)
DECODER_TOKENS = Value("decoder_tokens", "decoder_token_mask", _writers, _decoder_tokens)
