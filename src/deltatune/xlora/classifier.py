"""The classifier: from a token's last hidden state to a weight for each expert, in every layer or the same in all."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from deltatune.xlora.config import XLoraConfig


class Classifier(nn.Module):
    """Trainable: `xlora_depth` linear layers, the last one with an output per expert (and layer)."""

    def __init__(self, config: XLoraConfig, experts: int, adapted: int) -> None:
        super().__init__()
        self.config, self.experts, self.adapted = config, experts, adapted
        assert config.hidden_size is not None
        widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1)]
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
            layers += [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p else []
        layers.append(nn.Linear(widths[-1], experts * (adapted if config.layerwise_scalings else 1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, adapted layers, experts)."""
        logits = self.layers(hidden.to(next(self.layers.parameters()).dtype))
        logits = logits.unflatten(-1, (-1, self.experts)).expand(-1, -1, self.adapted, -1)
        if not self.config.enable_softmax:
            return logits
        return (logits / self.config.softmax_temperature).softmax(-1)
