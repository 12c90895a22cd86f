"""On which device each layer of a model is that accelerate has spread over several."""

from __future__ import annotations

from typing import Any

from deltatune.errors import StateError


def get_layer_device_map(model: Any) -> dict[int, int | str] | None:
    """Layer number -> device on which it runs; layers kept on the CPU or on disk run on the first other device.

    None for a model without `hf_device_map`.

    Raises:
        StateError: A layer is in no entry of the map.
    """
    placed: dict[str, int | str] | None = getattr(model, "hf_device_map", None)
    if placed is None:
        return None
    runs = [device for device in placed.values() if device not in ("cpu", "disk")] or ["cpu"]
    where = {name: runs[0] if device in ("cpu", "disk") else device for name, device in placed.items()}
    layers: range = range(model.config.get_text_config().num_hidden_layers)
    if set(where) == {""}:
        return dict.fromkeys(layers, where[""])
    found: dict[int, int | str] = {}
    for name, device in where.items():
        for part in name.split("."):
            if part.isdigit() and int(part) in layers:
                found[int(part)] = device
                break
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise StateError(
            f"get_layer_device_map: layer {missing[0]} is in no entry of hf_device_map ({', '.join(list(where)[:5])})",
            field="hf_device_map",
            found=missing,
        )
    return dict(sorted(found.items()))


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Move the keys and values of a cache to the devices of their layers; of models on one device nothing moves."""
    from transformers import Cache, EncoderDecoderCache

    if not isinstance(cache, Cache):
        return
    if isinstance(cache, EncoderDecoderCache):
        return map_cache_to_layer_device_map(model, cache.self_attention_cache)
    where = get_layer_device_map(model)
    if where is None:
        return
    for index, layer in enumerate(list[Any](cache.layers)):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None and index in where:
            layer.keys, layer.values = keys.to(where[index]), values.to(where[index])
