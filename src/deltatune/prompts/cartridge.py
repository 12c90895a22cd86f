"""Cartridges: K' = [C_K; K], V' = [C_V; V], the first rows of C fixed as a sink.   https://arxiv.org/abs/2506.06266

A cartridge stands for a long text: the keys and values of its beginning, trained further until the model answers as if
it had read the whole. It is a prefix (`deltatune.prompts.prefix` tells how one acts) in which the first tokens stay as
they are, because models use the first token of a text as a place to look at when there is nothing to look at; moving it
makes training unsteady (section 4 of the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Method
from deltatune.config import PeftType, config
from deltatune.prompts.config import KeyValueConfig, twenty_tokens
from deltatune.prompts.encoder import KeyValueEncoder
from deltatune.prompts.key_values import Prefix


@config
class CartridgeConfig(KeyValueConfig):
    """What a user sets, beside where the cartridge goes and how it starts (`KeyValueConfig`).

    Attributes:
        num_frozen_tokens: How many of the first virtual tokens are never trained.
    """

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        if self.peft_type is None:
            self.peft_type = PeftType.CARTRIDGE
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        most = self.num_virtual_tokens
        if self.num_frozen_tokens < 0 or (most is not None and self.num_frozen_tokens > most):
            expected = "0 or more" if most is None else f"0 to num_virtual_tokens={most}"
            checks.refuse(type(self).__name__, "num_frozen_tokens", self.num_frozen_tokens, expected)


class CartridgeEncoder(KeyValueEncoder):
    """Rows (P, width), as those of a prefix without projection.

    Attributes:
        frozen_embedding: The first `num_frozen_tokens` rows: a buffer, which nothing that sets `requires_grad` reaches.
        trainable_embedding: The rows after them.
    """

    frozen_embedding: Tensor | None

    def __init__(self, config: CartridgeConfig) -> None:
        super().__init__(config)
        width, frozen = sum(self.part_sizes), config.num_frozen_tokens
        self.num_frozen_tokens, self.num_trainable_tokens = frozen, config.length - frozen
        self.register_buffer("frozen_embedding", torch.randn(frozen, width) if frozen else None)
        self.trainable_embedding = nn.Parameter(torch.randn(self.num_trainable_tokens, width))

    @property
    def weight(self) -> Tensor:
        """All rows (P, width)."""
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        """All rows; of the given virtual tokens (...), (..., width)."""
        return self.weight if tokens is None else nn.functional.embedding(tokens, self.weight)

    @torch.no_grad()
    def fill(self, rows: Tensor) -> None:
        frozen, trainable = rows.detach().split([self.num_frozen_tokens, self.num_trainable_tokens])
        if self.frozen_embedding is not None:
            self.frozen_embedding.copy_(frozen)
        self.trainable_embedding.copy_(trainable)


METHOD = Method(
    PeftType.CARTRIDGE,
    CartridgeConfig,
    None,
    key_prefix="prompt_",
    graft=Prefix,
    encoder=CartridgeEncoder,
    learning_rate=1e-2,
    train_options=twenty_tokens,
)
