"""`ensure_weight_tying`: what is trained of an embedding is trained of the layers that share its weight too.

An output layer reads the embedding's table the other way round, so that its update is the embedding's, transposed.
Modules that are trained whole share one copy.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter, LinearMap
from deltatune.copies import TrainedCopies
from deltatune.errors import ConfigError
from deltatune.layer import AdaptedLayer
from deltatune.notice import warn
from deltatune.patterns import name_matches
from deltatune.targets import walk

_STARTS = (True, False, None, "gaussian")


class TiedLoRA(Adapter):
    """LoRA of an embedding on a layer that shares its weight: W'^T = W^T + (alpha / r) A^T B^T, the same A and B."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    views: ClassVar[tuple[str, ...]] = ("scaling", "r", "lora_alpha")

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.r, self.lora_alpha, self.scaling = owner.r, owner.lora_alpha, owner.scaling
        self.lora_dropout: nn.Module = nn.Dropout(getattr(owner.lora_dropout, "p", 0.0))
        self.lora_embedding_A: nn.Parameter = owner.lora_A.weight  # (r, tokens)
        self.lora_embedding_B: nn.Parameter = owner.lora_B.weight  # (width, r)
        self.identity_at_birth = owner.identity_at_birth

    def adapt(self, weight: Tensor) -> Tensor:
        update = self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T
        return weight + update.to(torch.promote_types(weight.dtype, update.dtype))

    def forward(self, x: Tensor, layer: LinearMap) -> Tensor:
        y = layer(x)
        h = layer.apply(self.lora_dropout(x), self.lora_embedding_B.T)
        return y + (self.scaling * layer.mix(h, self.lora_embedding_A.T)).to(y.dtype)

    # Files repeat the factors, as PEFT writes them.

    def file_tensors(self) -> dict[str, Tensor]:
        A, B = self.lora_embedding_B.T.contiguous(), self.lora_embedding_A.T.contiguous()
        return {"lora_A.weight": A, "lora_B.weight": B}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.lora_embedding_B.data.copy_(tensors["lora_A.weight"].T)
        self.lora_embedding_A.data.copy_(tensors["lora_B.weight"].T)


def follow(owner: Any, layer: LinearMap) -> TiedLoRA | None:
    """What an output layer has of an embedding's LoRA.

    Raises:
        ConfigError: The embedding's has a variant, which has no such form.
    """
    if not owner.embedding or layer.kind != "linear":
        return None
    for variant in owner.variants:
        raise ConfigError(
            f"LoraConfig: ensure_weight_tying=True, and the embedding has {type(variant).__name__}, which the layers "
            "that share its weight cannot follow; leave one of the two at its default",
            field="ensure_weight_tying",
            found=type(variant).__name__,
        )
    return TiedLoRA(owner)


def retarget(model: nn.Module, config: Any) -> None:
    """Name the input embedding where a config names layers that share its weight, as PEFT does; in place."""
    embedding, followers = _tied(model)
    if not followers:
        warn("ensure_weight_tying=True: no layer of the model shares the weight of its input embedding")
        return
    _check_tokens(config, [embedding, *followers])
    targets = _retargeted(config.target_modules, embedding, followers)
    saved = _retargeted(config.modules_to_save, embedding, followers)
    if saved is not None:
        config.modules_to_save = sorted({*saved, *followers})  # both ends, of one copy
    elif targets is not None:
        _check_options(config, embedding)
        config.target_modules = targets if isinstance(targets, str) else set(targets)
    elif config.trainable_token_indices is None:
        warn("ensure_weight_tying=True: neither target_modules nor modules_to_save names the embedding")


def _tied(model: nn.Module) -> tuple[str, list[str]]:
    """Path of the input embedding, and those of other modules that share its weight."""
    find: Any = getattr(model, "get_input_embeddings", None)
    source = find() if find else None
    weight = None if source is None else _weight(source)
    if weight is None:
        return "", []
    paths = [path for path, module in walk(model) if _weight(module) is weight]
    first = next(path for path, module in walk(model) if module is source)
    return first, [path for path in paths if path != first and not path.startswith(f"{first}.")]


def _weight(module: nn.Module) -> Any:
    wrapped = {AdaptedLayer: "base_layer", TrainedCopies: "original_module"}.get(type(module))
    holder = module if wrapped is None else module._modules[wrapped]
    return holder._parameters.get("weight")  # type: ignore[union-attr]


def _retargeted(names: Any, embedding: str, followers: list[str]) -> Any:
    """The names without those of the followers, and with the embedding's; None if they name neither."""
    tied = [embedding, *followers]
    if not names or not any(name_matches(names, path) for path in tied):
        return None
    if isinstance(names, str):
        return rf"(?:{names})|{embedding.replace('.', '[.]')}"
    kept = [name for name in names if not any(name_matches([name], path) for path in followers)]
    named = any(name_matches([name], embedding) for name in kept)
    return [*kept, *([] if named else [embedding])]


def _check_options(config: Any, embedding: str) -> None:
    if config.init_lora_weights not in _STARTS:
        raise ConfigError(
            f"LoraConfig: ensure_weight_tying=True with init_lora_weights={config.init_lora_weights!r} on {embedding}; "
            f"use one of {_STARTS[:2] + _STARTS[3:]}",
            field="init_lora_weights",
            found=config.init_lora_weights,
        )


def _check_tokens(config: Any, tied: list[str]) -> None:
    chosen = config.trainable_token_indices
    if not isinstance(chosen, dict):
        return
    named = {name: list(tokens) for name, tokens in chosen.items() if any(name_matches([name], path) for path in tied)}
    if len({tuple(tokens) for tokens in named.values()}) > 1:
        raise ConfigError(
            f"LoraConfig: ensure_weight_tying=True, and trainable_token_indices has different tokens for layers that "
            f"share a weight: {named}; name the same, or the embedding alone",
            field="trainable_token_indices",
            found=named,
        )
