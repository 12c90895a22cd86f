"""The shadow on its own: head(P backbone(x)), an ordinary small transformers model without the base."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltatune.errors import StateError, TargetError
from deltatune.shadow.backbone import decoder_of
from deltatune.shadow.graft import Shadow

if TYPE_CHECKING:
    from deltatune.model import PeftModel


@torch.no_grad()
def detached_shadow(model: PeftModel, adapter_name: str | None = None) -> Any:
    """What a shadow has learnt to say before any block of the base: a new model of the base's class.

    It shares nothing with the base, generates, and is saved by its own `save_pretrained`. P is folded into its head.

    Args:
        adapter_name: The adapter; None: the active one.

    Raises:
        StateError: The adapter is no shadow.
        TargetError: The base has no head that a smaller model could take over.
    """
    name = model.active_adapters[0] if adapter_name is None else adapter_name
    shadow = model.prompts.get(name)
    if not isinstance(shadow, Shadow):
        raise StateError(f"detached_shadow: adapter {name!r} is no shadow", field="adapter_name", found=name)
    base: Any = model.get_base_model()
    path, decoder = decoder_of(base)
    network = shadow.encoder
    config: Any = copy.deepcopy(network.shadow_backbone.config)
    config.tie_word_embeddings = False
    if type(config) is not type(base.config):
        raise TargetError(
            f"{type(base).__name__} is more than its decoder; take model.prompts[{name!r}].encoder apart",
            field="model",
            found=type(base).__name__,
            expected=type(config).__name__,
        )
    config.num_labels, config.pad_token_id = base.config.num_labels, base.config.pad_token_id
    made = type(base)(config).eval()
    inner: Any = made.get_submodule(path) if path else made
    if shadow.shares_embeddings:
        inner.get_input_embeddings().weight.copy_(decoder.get_input_embeddings().weight)
    _, unexpected = inner.load_state_dict(network.shadow_backbone.state_dict(), strict=False)
    assert not unexpected
    old = network.shadow_head if network.shadow_head is not None else base.get_output_embeddings()
    new = getattr(made, "score", None) if network.shadow_head is not None else made.get_output_embeddings()
    if not isinstance(old, nn.Module) or not isinstance(new, nn.Linear):
        raise TargetError(
            f"{type(base).__name__} has no head that a smaller model could take over",
            field="model",
            found=type(base).__name__,
            expected="a model with a linear head",
        )
    weight: Any = old.weight
    projection = network.shadow_projection
    new.weight.copy_(weight if projection is None else weight.float() @ projection.weight)
    if new.bias is not None:
        new.bias.copy_(old.bias)  # type: ignore[arg-type]
    return made
