"""Between the two layouts: where positions are rotary or absent, PEFT's prefix is the native one turned by R(P).

PEFT lets the tokens start at position P, natively they start at 0. A query and a key meet at the same angle in both
when keys of the prefix are turned: K_peft = R(P) K_native. Everything else that a length of cache moves (learned
positions, relative bias, sliding windows, the order of layers in encoder-decoders) has no counterpart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltatune.errors import TargetError
from deltatune.patterns import modules_by_name
from deltatune.prompts.capture import check_shift
from deltatune.prompts.positions import position_modules
from deltatune.prompts.rotation import rotations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltatune.prompts.key_values import Prefix


def convert(prefix: Prefix, rows: Tensor, target: str) -> Tensor:
    """The rows (P, width) that mean in layout `target` what `rows` mean in the prefix's own; exact, or TargetError."""
    model = prefix.stage.model
    obstacle = _obstacle(prefix, model)
    if obstacle is not None:
        raise TargetError(
            f"{type(model).__name__}: the prefix {prefix.name!r} cannot be written with format={target!r}, because "
            f"{obstacle}; save it without format=",
            field="format",
            found=target,
            expected=prefix.config.layout,
        )
    check_shift(model, prefix.sites)
    count = prefix.config.length
    return turned(prefix, rows, count if target == "peft" else -count)


def turned(prefix: Prefix, rows: Tensor, turn: int) -> Tensor:
    """Rows (P, width) with the keys of every site moved on by `turn` positions, P or -P, where they are rotary."""
    model, count = prefix.stage.model, prefix.config.length
    parts = list(rows.split(prefix.encoder.part_sizes, dim=1))
    for site, (shape, rotation) in enumerate(zip(prefix.encoder.shapes, rotations(model, prefix.sites, count))):
        keys = parts[2 * site].unflatten(1, shape[:2])  # (P, heads, dim)
        parts[2 * site] = rotation(keys, turn).flatten(1)
    return torch.cat(parts, dim=1)


def _obstacle(prefix: Prefix, model: PreTrainedModel) -> str | None:
    """What stands in the way of an exact conversion, in words."""
    text = model.config.get_text_config()
    shapes = set(prefix.encoder.shapes)
    modules = modules_by_name(model)
    windows = [text.sliding_window] if getattr(text, "sliding_window", None) else []
    windows += [text.attention_chunk_size] if getattr(text, "attention_chunk_size", None) else []
    if getattr(model.config, "is_encoder_decoder", False):
        return "PEFT gives the layers of an encoder-decoder each other's parts of the prefix"
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return "PEFT has no prefix for models without text"
    if any(site.layout is not None for site in prefix.sites):
        return "its attention is code of its own, in which the shift of PEFT's positions is not known"
    if any(site.calls > 1 for site in prefix.sites):
        return "its attention modules are called several times in a pass, which PEFT counts as several layers"
    if len(shapes) > 1 or any(shape[:2] != shape[2:] for shape in shapes):
        return f"PEFT knows one shape for keys and values of all layers, and it has {sorted(shapes)}"
    if len(prefix.sites) != getattr(text, "num_hidden_layers", len(prefix.sites)):
        return f"PEFT gives each of its {text.num_hidden_layers} layers a prefix, and it has {len(prefix.sites)} sites"
    for name, module in position_modules(model, [site.name for site in prefix.sites]):
        if isinstance(module, nn.Embedding):
            return f"PEFT moves its learned positions ({name!r}) by the length of the prefix"
    if any(getattr(modules[site.name], "has_relative_attention_bias", False) for site in prefix.sites):
        return "PEFT puts a relative position bias between tokens and prefix"
    if windows:
        return f"PEFT's prefix slides out of its attention window of {windows[0]} tokens"
    return None
