"""Room for a second stack of keys and values in a model's cache: further layers at its end.

Whatever reorders, repeats, crops or resets a cache goes through all of its layers, so it does it to both stacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deltatune.errors import StateError

if TYPE_CHECKING:
    from transformers import Cache

LAYERS = "_deltatune_layers"  # key in the __dict__ of a cache: (start, end) of each adapter's layers


def makes_one(decoder: Any, inputs: dict[str, Any]) -> bool:
    """Whether the decoder is about to make a cache of its own, which further layers could not get into."""
    if inputs.get("past_key_values") is not None:
        return False
    asked = inputs.get("use_cache")
    if asked is None:
        asked = getattr(decoder.config, "use_cache", False) and not torch.is_grad_enabled()
        inputs["use_cache"] = asked
    return bool(asked) and not (decoder.training and getattr(decoder, "gradient_checkpointing", False))


def new_cache(decoder: Any) -> Cache:
    from transformers import DynamicCache

    return DynamicCache(config=decoder.config)


def own_layers(cache: Any, name: str, config: Any, decoder: Any) -> Cache:
    """An adapter's layers of the decoder's cache, as a cache; made when they are met for the first time.

    Args:
        config: Of the model whose keys and values they hold.

    Raises:
        StateError: The cache holds tokens already, of which the adapter has seen none.
    """
    from transformers import Cache

    places = vars(cache).setdefault(LAYERS, {})
    if name not in places:
        if cache.get_seq_length() > 0:
            raise StateError(
                f"past_key_values holds tokens that adapter {name!r} has not seen; begin with an empty cache",
                field="past_key_values",
                found=int(cache.get_seq_length()),
            )
        while cache.layer_class_to_replicate is not None and len(cache.layers) < _layers(decoder):
            cache.layers.append(cache.layer_class_to_replicate())
        made = _like(cache, config)
        places[name] = (len(cache.layers), len(cache.layers) + len(made))
        cache.layers.extend(made)
    start, end = places[name]
    return Cache(layers=cache.layers[start:end])


def _layers(decoder: Any) -> int:
    return decoder.config.get_text_config(decoder=True).num_hidden_layers


def _like(cache: Any, config: Any) -> list[Any]:
    """Empty layers for a model, of the sort that the decoder's cache has."""
    from transformers import DynamicCache, StaticCache

    if isinstance(cache, StaticCache):
        return StaticCache(config=config, max_cache_len=cache.get_max_length()).layers
    if isinstance(cache, DynamicCache):
        return DynamicCache(config=config).layers
    raise StateError(
        f"past_key_values: a {type(cache).__name__} has no place for an adapter's layers; use a DynamicCache or a "
        "StaticCache",
        field="past_key_values",
        found=type(cache).__name__,
    )
