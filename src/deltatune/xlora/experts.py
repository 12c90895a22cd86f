"""`Experts`: LoRA adapters on one layer, weighted by token. y' = y + g sum_i s_i(token) (alpha_i / r_i) B_i A_i x"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter, LinearMap
from deltatune.errors import StateError
from deltatune.methods.lora import LoRA

if TYPE_CHECKING:
    from deltatune.xlora.stage import Stage


class Experts(Adapter):
    """The experts that adapt one layer, by their number.

    Attributes:
        number: Of this layer, among those with experts.
        head: Whether it is the one that makes logits, perhaps of the last tokens only.
    """

    base_kinds = frozenset({"linear", "embedding"})
    identity_at_birth = "its experts are trained already"
    mergeable = "what its experts weigh depends on the token"

    def __init__(
        self, name: str, path: str, number: int, stage: Stage, experts: dict[int, LoRA], head: bool = False
    ) -> None:
        super().__init__()
        self.name, self.path, self.number, self.stage, self.head = name, path, number, stage, head
        self.experts = nn.ModuleDict({str(index): expert for index, expert in experts.items()})

    def requires_grad_(self, requires_grad: bool = True) -> Experts:
        """Experts are frozen unless the config says that they train."""
        return super().requires_grad_(requires_grad and self.stage.mixtures[self.name].config.use_trainable_adapters)

    def file_tensors(self) -> dict[str, Tensor]:
        return {}  # each expert has a folder of its own

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        config, y = self.stage.mixtures[self.name].config, layer(x)
        if self.stage.local.first and not config.scaling_pass_value:
            return y
        weights = sparse(self.stage.weights(self.name, self.path)[:, :, self.number], config)  # (B, T, experts)
        weights = self._fitted(weights, x)
        update = torch.zeros((), dtype=y.dtype, device=y.device)
        for index, expert in cast("Any", self.experts).items():
            weight = weights[..., int(index), None]
            if layer.kind == "embedding":  # which reads indices
                update = update + (weight * expert.update(x, layer)).to(y.dtype)
            else:  # before the expert, so that a bias of B is not weighted, as in PEFT
                update = update + expert.update(x * weight.to(x.dtype), layer).to(y.dtype)
        return y + config.global_scaling_weight * update

    def _fitted(self, weights: Tensor, x: Tensor) -> Tensor:
        """The weights in the shape of the layer's tokens.

        Raises:
            StateError: Its rows are no tokens of the batch (a pooled state, say, or the tokens that a router chose).
        """
        if weights.shape[:2] in (x.shape[:2], (1, 1)):
            return weights
        if self.head and x.ndim == 3 and len(x) == len(weights):
            return weights[:, weights.shape[1] - x.shape[1] :]
        if x.ndim == 2 and len(x) == weights.shape[0] * weights.shape[1]:
            return weights.flatten(0, 1)
        raise StateError(
            f"{self.path} is called with an input of shape {tuple(x.shape)}, which are not the {weights.shape[0]} x "
            f"{weights.shape[1]} tokens that X-LoRA has weights for; use experts that do not adapt this layer",
            path=self.path,
            found=tuple(x.shape),
        )


def sparse(weights: Tensor, config: Any) -> Tensor:
    """The weights with all but the `top_k_lora` largest set to zero, perhaps with a softmax over what is left."""
    if config.top_k_lora is not None:
        chosen = torch.zeros_like(weights, dtype=torch.bool)
        chosen = chosen.scatter(-1, weights.topk(config.top_k_lora, dim=-1).indices, True)
        weights = torch.where(chosen, weights, 0.0)
    if config.enable_softmax_topk:
        left = weights != 0
        weights = torch.where(left, weights.masked_fill(~left, float("-inf")).softmax(-1), 0.0)
    return weights
