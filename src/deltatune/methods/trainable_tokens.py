"""Trainable tokens: the rows of some tokens in an embedding are replaced by trained ones, W'[t] = T[t].

No paper of its own: it is what PEFT calls by this name. The idea of training the embeddings of a few tokens in a frozen
model is that of textual inversion.   https://arxiv.org/abs/2208.01618
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.methods.common import LayerConfig
from deltatune.targets import walk


@config
class TrainableTokensConfig(LayerConfig):
    """The options of trainable tokens, with PEFT's names and defaults.

    Attributes:
        token_indices: The tokens that train, by their number in the vocabulary.
        target_modules: As for every method; by default the input embedding. Layers that share its weight (a tied
            output layer) follow.
        init_weights: True: start from the rows that are there. False: random rows, so that a fresh adapter changes
            the output.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.TRAINABLE_TOKENS
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        counts = Counter(self.token_indices)
        wrong = [token for token, count in counts.items() if token < 0 or count > 1]
        if wrong:
            raise ConfigError(
                f"TrainableTokensConfig: token_indices holds {wrong[0]}, which is "
                f"{'negative' if wrong[0] < 0 else 'there twice'}; name each token once, counted from 0",
                field="token_indices",
                found=wrong,
            )


class TrainableTokens(Adapter):
    """Trainable: T (tokens, width), whole rows and not their difference, so that it does not matter what was there."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"embedding", "linear"})
    views: ClassVar[tuple[str, ...]] = ("trainable_tokens_delta", "token_indices")

    index: Tensor
    place: Tensor

    def __init__(self, layer: LinearMap, tokens: list[int], rows: nn.Parameter, owner: bool = True) -> None:
        super().__init__()
        self.token_indices, self.owner = list(tokens), owner
        self.reads_tokens = layer.kind == "embedding"  # else it writes one number per token, as an output layer does
        self.trainable_tokens_delta = rows
        self.register_buffer("index", torch.tensor(tokens), persistent=False)
        place = torch.full((layer.in_features if self.reads_tokens else 0,), -1)
        if self.reads_tokens:
            place[tokens] = torch.arange(len(tokens))
        self.register_buffer("place", place, persistent=False)  # token -> its row of T, or -1
        padding = getattr(layer.module, "padding_idx", None) if self.reads_tokens else None  # type: ignore[attr-defined]
        self.padding = tokens.index(padding) if padding in tokens else None  # torch does not train that row

    @classmethod
    def build(cls, layer: LinearMap, config: TrainableTokensConfig, path: str) -> TrainableTokens:
        tokens = config.token_indices
        count = layer.in_features if layer.kind == "embedding" else layer.out_features
        if not tokens or max(tokens) >= count:
            wrong = f"{max(tokens)} is not in {path}" if tokens else "no token is named, so nothing would train"
            raise ConfigError(
                f"TrainableTokensConfig: token_indices={tokens!r}: {wrong}; it has the tokens 0 to {count - 1}",
                field="token_indices",
                path=path,
                found=tokens,
                expected=count,
            )
        with torch.no_grad():
            there = layer.weight[:, tokens].T if layer.kind == "embedding" else layer.weight[tokens]
            rows = there.clone() if config.init_weights else torch.randn(there.shape)
        made = cls(layer, tokens, nn.Parameter(rows))
        if not config.init_weights:
            made.identity_at_birth = "init_weights=False draws the rows"
        return made

    def tied(self, layer: LinearMap, config: Any = None) -> TrainableTokens | None:
        """The same rows for an output layer, or another embedding, of this embedding's weight."""
        if not self.reads_tokens or (config is not None and config.token_indices != self.token_indices):
            return None
        return type(self)(layer, self.token_indices, self.trainable_tokens_delta, owner=False)

    @property
    def T(self) -> Tensor:
        return self.trainable_tokens_delta

    def adapt(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.T.dtype)
        rows = (self.T.T if self.reads_tokens else self.T).to(wide)
        return weight.to(wide).index_copy(1 if self.reads_tokens else 0, self.index, rows)

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        places = self.index
        rows = self.T - (layer.weight[:, places].T if self.reads_tokens else layer.weight[places]).to(self.T.dtype)
        count = layer.in_features if self.reads_tokens else layer.out_features
        ones = F.one_hot(places, count).to(rows)
        return (rows.T, ones) if self.reads_tokens else (ones.T, rows)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y = layer(x)
        if not self.reads_tokens:
            own = layer.apply(x, self.T, None if layer.bias is None else layer.bias[self.index])
            return y.index_copy(-1, self.index, own.to(y.dtype))
        place = self.place[x]
        rows = F.embedding(place.clamp(min=0), self.T, self.padding)
        ones = self.T.new_ones(()).expand(1, layer.in_features)
        rows = rows * layer.apply(x, ones)  # the factor by which scaled embeddings multiply their rows
        return torch.where((place >= 0)[..., None], rows.to(y.dtype), y)

    # Files repeat the rows for every layer that follows, as PEFT writes them.

    def file_tensors(self) -> dict[str, Tensor]:
        return {"trainable_tokens_delta": self.T}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.T.data.copy_(tensors["trainable_tokens_delta"])

    def extra_repr(self) -> str:
        return f"tokens={len(self.token_indices)}"


def _input_embedding(model: nn.Module) -> set[str] | None:
    """The path of the model's input embedding."""
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding = find() if find else None
    return next(({path} for path, module in walk(model) if module is embedding), None)


METHOD = Method(
    PeftType.TRAINABLE_TOKENS,
    TrainableTokensConfig,
    TrainableTokens,
    key_prefix="trainable_tokens_",
    find_targets=_input_embedding,
    learning_rate=1e-3,
)


class TokenAdapter(TrainableTokens):
    """The same beside another method: files have another name for it there, and have it once."""

    views: ClassVar[tuple[str, ...]] = (*TrainableTokens.views, "token_adapter")

    def file_tensors(self) -> dict[str, Tensor]:
        return {f"token_adapter.{name}": rows for name, rows in super().file_tensors().items() if self.owner}

    def live_tensors(self) -> dict[str, tuple[nn.Module, str]]:
        return {f"token_adapter.{name}": place for name, place in super().live_tensors().items()}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        if self.owner:
            super().load_file_tensors({name.removeprefix("token_adapter."): rows for name, rows in tensors.items()})


def beside(tokens: list[int] | dict[str, list[int]] | None) -> list[tuple[Method, LayerConfig]]:
    """What a config's field `trainable_token_indices` asks for: rows of the input embedding, or of the layers named."""
    method = dataclasses.replace(METHOD, adapter=TokenAdapter)
    named: dict[Any, Any] = tokens if isinstance(tokens, dict) else {} if tokens is None else {None: tokens}
    return [
        (method, TrainableTokensConfig(token_indices=each, target_modules=None if name is None else [name]))
        for name, each in named.items()
    ]
