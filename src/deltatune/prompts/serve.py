"""The serving form: a prefix as an ordinary cache for the bare model, and a cache as the start of a prefix.

How the bare model is called with P entries of cache and T tokens:

| layout | positions of the model | keys in the cache | the call                                                 |
|--------|------------------------|-------------------|----------------------------------------------------------|
| native | rotary, or none        | R(P) K            | as with any cache of P tokens                            |
| native | learned                | K                 | position_ids from 0: a native prefix uses up no position |
| peft   | any                    | K                 | as with any cache of P tokens                            |

The attention mask, where there is one, has P + T columns, the first P of ones. A cache is written to as the model runs:
take a new one for each conversation (`copy.deepcopy` of one that is kept).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import DataError, MismatchError, TargetError
from deltatune.patterns import modules_by_name
from deltatune.prompts.capture import rows_of
from deltatune.prompts.convert import turned
from deltatune.prompts.example import ordinary_tokens
from deltatune.prompts.positions import position_modules
from deltatune.prompts.sites import undisturbed
from deltatune.prompts.starts import fillable, named_prefix
from deltatune.selection import Call

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from deltatune.prompts.key_values import Prefix

PROBE = 5  # tokens of the trial run


def to_cache(model: Any, adapter_name: str | None = None, batch_size: int = 1) -> DynamicCache:
    """A prefix of a PeftModel (the active one where no name is given) as a cache for the bare model.

    A trial run compares the bare model on the cache with the model that has the prefix.

    Raises:
        TargetError: The model is no decoder, or a cache cannot say what the prefix says.
    """
    return cache_of(named_prefix(model, adapter_name, "to_cache"), batch_size)


def cache_of(prefix: Prefix, batch_size: int = 1) -> DynamicCache:
    model = prefix.stage.model
    _check_decoder(prefix, model)
    with torch.no_grad():
        rows = prefix.encoder().detach()
        if prefix.config.layout == "native":
            rows = turned(prefix, rows, prefix.config.length)
        cache = _filled(prefix, model, rows, batch_size)
        _check_equal(prefix, model, _filled(prefix, model, rows, 1))
    return cache


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """Rows (P, width) of a prefix in PEFT's layout from the first P entries of a cache of one sequence.

    Raises:
        DataError: The cache is empty, of several sequences, or shorter than P.
    """
    pairs = _pairs(past_key_values)
    if not pairs:
        raise DataError(
            "past_key_values is empty; run the model on a text with use_cache=True first",
            field="past_key_values",
            found=0,
            expected="a cache with keys and values",
        )
    for key, value in pairs:
        if key.ndim != 4 or value.ndim != 4 or key.shape[0] != 1 or key.shape[2] < num_virtual_tokens:
            raise DataError(
                f"past_key_values has keys of shape {tuple(key.shape)}, expected (1, heads, tokens, dim) with at least "
                f"num_virtual_tokens={num_virtual_tokens} tokens",
                field="past_key_values",
                found=tuple(key.shape),
            )
    return rows_of(pairs, num_virtual_tokens).to(pairs[0][0])


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Fill a prefix of a PeftModel with the first entries of a cache of the base model; return its rows (P, width).

    In the native layout the keys are turned back by R(-P) where positions are rotary, so that the text stands right
    before the first token, as with `initialize_kv_prefix_from_text`.

    Args:
        adapter_name: The prefix to fill; the active one when left out.
        past_key_values: What the base model returned for one sequence that starts at position 0.
        num_virtual_tokens: Must be the number of virtual tokens of that prefix.

    Raises:
        MismatchError: The cache has other layers or shapes than the prefix has sites.
    """
    prefix = fillable(model, adapter_name, num_virtual_tokens, "initialize_kv_prefix_from_past_key_values")
    count = prefix.config.length
    rows = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    shapes = [(k.shape[1], k.shape[3], v.shape[1], v.shape[3]) for k, v in _pairs(past_key_values)]
    if shapes != prefix.encoder.shapes:
        raise MismatchError(
            f"past_key_values has layers of shapes {shapes}, the prefix {prefix.name!r} needs {prefix.encoder.shapes}",
            field="past_key_values",
            found=shapes,
            expected=prefix.encoder.shapes,
        )
    rows = rows.to(prefix.stage.model.device)
    if prefix.config.layout == "native":
        rows = turned(prefix, rows, -count)
    prefix.encoder.fill(rows)
    return rows


def _pairs(past_key_values: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values by layer; of an encoder-decoder those of self-attention. Layers without keys are passed over."""
    layers = [(layer[0], layer[1]) for layer in past_key_values]
    return [(key, value) for key, value in layers if isinstance(key, Tensor) and isinstance(value, Tensor)]


def _check_decoder(prefix: Prefix, model: PreTrainedModel) -> None:
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    reason = None
    if getattr(model.config, "is_encoder_decoder", False) or not _is_causal(prefix, model):
        reason = "it is no decoder, whose cache could hold it"
    elif any(site.calls > 1 for site in prefix.sites):
        reason = "its attention modules are called several times in a pass"
    elif window and "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"]):
        reason = f"its cache forgets what lies before a window of {window} tokens"
    if reason is not None:
        _refuse(prefix, model, reason)


def _is_causal(prefix: Prefix, model: PreTrainedModel) -> bool:
    """Attention that is code of its own does not say so; the trial run tells."""
    told = any(getattr(module, "is_causal", False) for module in model.modules())
    return model.can_generate() and (told or any(site.layout is not None for site in prefix.sites))


def _filled(prefix: Prefix, model: PreTrainedModel, rows: Tensor, batch_size: int) -> DynamicCache:
    """Each site's keys and values at the layer of the cache where the model itself keeps that site's."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    parts = rows.to(model.dtype).split(prefix.encoder.part_sizes, dim=1)
    modules: dict[str, Any] = modules_by_name(model)
    for index, (site, (heads, dim, value_heads, value_dim)) in enumerate(zip(prefix.sites, prefix.encoder.shapes)):
        layer = getattr(modules[site.name], "layer_idx", index)
        key = parts[2 * index].unflatten(1, (heads, dim)).transpose(0, 1)  # (heads, P, dim)
        value = parts[2 * index + 1].unflatten(1, (value_heads, value_dim)).transpose(0, 1)
        key, value = (part.expand(batch_size, -1, -1, -1).contiguous() for part in (key, value))
        cache.update(key, value, layer)
    return cache


def _check_equal(prefix: Prefix, model: PreTrainedModel, cache: DynamicCache) -> None:
    """The bare model on the cache must answer as the model with the prefix does."""
    inputs = {"input_ids": ordinary_tokens(model, PROBE)}
    learned = prefix.config.layout == "native" and any(
        isinstance(module, nn.Embedding) for _, module in position_modules(model, [site.name for site in prefix.sites])
    )
    positions = {"position_ids": torch.arange(PROBE, device=model.device)[None]} if learned else {}
    selection = prefix.stage.selection
    try:
        with undisturbed(model):
            with selection.use(Call((prefix.name,))):
                expected = model(**inputs)[0].float()
            with selection.use(Call()):
                found = model(**inputs, **positions, past_key_values=cache)[0].float()
        error, scale = (found - expected).abs().max(), expected.abs().max().clamp_min(1e-6)
        failure = None if error <= min(1e3 * torch.finfo(model.dtype).eps, 0.1) * scale else "it answers otherwise"
    except Exception as problem:  # whatever a model raises at a cache that it does not expect
        failure = f"it fails with {type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
    if failure is not None:
        _refuse(prefix, model, f"in a trial run of the bare model on the cache {failure}")


def _refuse(prefix: Prefix, model: PreTrainedModel, reason: str) -> None:
    raise TargetError(
        f"{type(model).__name__}: the prefix {prefix.name!r} cannot be served as a cache, because {reason}; serve the "
        "model with its adapter",
        field="adapter_name",
        found=prefix.name,
    )
