"""`InputEncoder`: what trains where rows are put before the embedded tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import DataError
from deltatune.prompts.config import PromptLearningConfig

ROWS = "prompt_embeddings"  # PEFT's name in files
STATE = "prompt_encoder_state."  # where an encoder that makes the rows stands beside them; PEFT ignores it


class InputEncoder(nn.Module):
    """Rows (P, token_dim) of the virtual tokens, in encoder-decoders with two submodules (2P, token_dim).

    Attributes:
        embedding: The rows themselves, or what they are made from.
        takes_tasks: Whether the rows depend on the task of each example (`task_ids`).
    """

    takes_tasks: ClassVar[bool] = False
    embedding: nn.Embedding

    def __init__(self, config: PromptLearningConfig) -> None:
        super().__init__()
        assert config.token_dim is not None
        self.embedding = nn.Embedding(config.length * (config.num_transformer_submodules or 1), config.token_dim)

    def forward(self, tokens: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
        """Rows (P, width), or (B, P, width) by task; of the given virtual tokens (..., width)."""
        return self.embedding.weight if tokens is None else self.embedding(tokens)

    def start_at(self, rows: Tensor) -> None:
        """Begin with these rows (P, width)."""
        with torch.no_grad():
            self.embedding.weight.copy_(rows.detach())

    # ----------------------------------------------------------------------------------------------------------- files

    def file_tensors(self) -> dict[str, Tensor]:
        """Tensors of a file; `prompt_embeddings` are the rows as PEFT computes with them."""
        return {ROWS: self().detach()}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Fill in tensors whose names and shapes have been checked; a file of PEFT's holds those it needs only."""
        self.start_at(tensors[ROWS])

    def state_tensors(self) -> dict[str, Tensor]:
        """All of the encoder, for files from which training goes on."""
        return {STATE + name: tensor.detach() for name, tensor in self.state_dict().items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> bool:
        """Take the encoder from a file that holds it whole."""
        own = {name.removeprefix(STATE): tensor for name, tensor in tensors.items() if name.startswith(STATE)}
        if own:
            self.load_state_dict(own)
        return bool(own)


def embedded(word_embeddings: Callable[[Tensor], Tensor], ids: list[int], vocabulary: int) -> Tensor:
    """Rows of real tokens, as the model embeds them."""
    outside = [token for token in ids if not 0 <= token < vocabulary]
    if outside:
        raise DataError(
            f"token ids {outside[:3]} are outside of the vocabulary, which has {vocabulary} tokens", found=outside
        )
    weight: Any = getattr(word_embeddings, "weight", None)
    with torch.no_grad():
        return word_embeddings(torch.tensor([ids], device=None if weight is None else weight.device))[0].float()


def repeated(ids: list[int], count: int) -> list[int]:
    """The first `count` of the ids, over and over where they are fewer."""
    return (ids * -(-count // len(ids)))[:count]
