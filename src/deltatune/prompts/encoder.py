"""`KeyValueEncoder`: what trains where keys and values are learned. It gives rows, and cuts them for the attentions."""

from __future__ import annotations

from torch import Tensor, nn

from deltatune.errors import MismatchError
from deltatune.prompts.config import KeyValueConfig


class KeyValueEncoder(nn.Module):
    """One row per virtual token; a row is the keys and values of all sites side by side:

        row = [K of site 0 | V of site 0 | K of site 1 | V of site 1 | ...]        K of a site: heads * head dim

    Attributes:
        shapes: Key heads, key dim, value heads, value dim of each part of a row.
        layer_of_site: Which part of the rows each site reads.
        transform: What spreads a narrower embedding over the row; None where the rows themselves are trained.
    """

    transform: nn.Sequential | None

    def __init__(self, config: KeyValueConfig) -> None:
        super().__init__()
        self.shapes = [tuple(shape) for shape in config.shapes]
        self.layer_of_site = _layer_order(config)
        self.transform = None

    @property
    def part_sizes(self) -> list[int]:
        """Columns of a row that belong to the keys and to the values of each site, in order."""
        return [size for h, d, hv, dv in self.shapes for size in (h * d, hv * dv)]

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        """Rows (P, width); of the given virtual tokens (...), (..., width)."""
        raise NotImplementedError

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Keys (heads, P, dim) and values of every site. One split: its backward writes the gradient once."""
        parts = self().split(self.part_sizes, dim=1)
        cut = [
            (_heads(parts[2 * layer], heads, dim), _heads(parts[2 * layer + 1], value_heads, value_dim))
            for layer, (heads, dim, value_heads, value_dim) in enumerate(self.shapes)
        ]
        return [cut[layer] for layer in self.layer_of_site]

    def fill(self, rows: Tensor) -> None:
        """Take rows (P, width) as they are: the folded prefix of a file, or keys and values of real text."""
        raise NotImplementedError

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """PEFT's name for `fill`; MismatchError where the rows have another shape."""
        wanted = (self().shape[0], sum(self.part_sizes))
        if tuple(prompt_embeddings.shape) != wanted:
            raise MismatchError(
                f"prompt_embeddings has shape {tuple(prompt_embeddings.shape)}, this adapter holds {wanted}: one row "
                "of keys and values per virtual token",
                found=tuple(prompt_embeddings.shape),
                expected=wanted,
            )
        self.fill(prompt_embeddings)


def _heads(columns: Tensor, heads: int, dim: int) -> Tensor:
    return columns.unflatten(1, (heads, dim)).transpose(0, 1)  # (P, heads * dim) -> (heads, P, dim)


def _layer_order(config: KeyValueConfig) -> list[int]:
    """Which part of the rows each site reads: its own, or in PEFT's encoder-decoders part 2i mod layers.

    PEFT doubles the list of keys and values for the two submodules and then cuts it into fours, so a decoder layer
    meets every second layer of the prefix; with an even number of layers the others are never used.
    """
    count = len(config.shapes)
    if config.layout == "peft" and config.num_transformer_submodules == 2:
        return [2 * site % count for site in range(count)]
    return list(range(count))
