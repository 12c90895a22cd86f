"""GLoRA: W' = W + W o A + B, b' = b + b o D + E + W C, o entry by entry.   https://arxiv.org/abs/2306.07967"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError, MismatchError
from deltatune.factors import shift
from deltatune.methods.common import LayerConfig, all_linear


@config
class GloraConfig(LayerConfig):
    """GLoRA's options, with PEFT's names and defaults.

    Attributes:
        r: Rank of the supports that are a product of two factors ("lora").
        config_A_B: Support of A and B: "lora"; "vector", one number per output; "constant", one number; "none".
        config_C: Of C, which makes a bias out of the weight: "lora", "vector" (one number per input), "none".
        config_D_E: Of D and E, which scale and shift the bias: "vector", "constant", "none".
        init_weights: True starts as the identity; False random.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    r: int = 8
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        self.peft_type = PeftType.GLORA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("GloraConfig", "r", self.r)
        checks.one_of("GloraConfig", "config_A_B", self.config_A_B, ("lora", "vector", "constant", "none"))
        checks.one_of("GloraConfig", "config_C", self.config_C, ("lora", "vector", "none"))
        checks.one_of("GloraConfig", "config_D_E", self.config_D_E, ("vector", "constant", "none"))
        biases.check("GloraConfig", self.bias, "glora_only")


class Support(nn.Module):
    """One of A ... E: a product Xd Xu of rank r, or X, which repeats along the axes where it has one entry."""

    def __init__(self, full: tuple[int, ...], kind: str, rank: int) -> None:
        super().__init__()
        self.rank = rank if kind == "lora" else 0
        if self.rank:
            self.Xd, self.Xu = nn.Parameter(torch.zeros(full[0], rank)), nn.Parameter(torch.empty(rank, full[1]))
            nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
        else:
            self.X = nn.Parameter(torch.zeros((full[0], 1)[: len(full)] if kind == "vector" else (1,)))

    def scatter(self) -> None:
        """Move what starts at zero."""
        zero = self.Xd if self.rank else self.X
        if zero.numel() == 1:
            nn.init.normal_(zero, std=0.02)
        else:
            nn.init.kaiming_uniform_(zero if zero.dim() > 1 else zero.unsqueeze(0), a=math.sqrt(5))

    @property
    def value(self) -> Tensor:
        return self.Xd @ self.Xu if self.rank else self.X


class GLoRA(Adapter):
    """Trainable: supports A and B (out, in); of layers with a bias also C (in, 1), D and E (out,)."""

    views: ClassVar[tuple[str, ...]] = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E", "r")

    glora_A: Support | None
    glora_B: Support | None
    glora_C: Support | None
    glora_D: Support | None
    glora_E: Support | None

    def __init__(self, layer: LinearMap, r: int, weights: str, coupling: str, biases: str, zero: bool) -> None:
        super().__init__()
        self.r, matrix = r, (layer.out_features, layer.in_features)
        self.full = {"A": matrix, "B": matrix, "C": (matrix[1], 1), "D": matrix[:1], "E": matrix[:1]}
        kinds = {"A": weights, "B": weights, "C": coupling, "D": biases, "E": biases}
        for letter, kind in kinds.items():
            absent = kind == "none" or (letter in "CDE" and layer.bias is None)
            setattr(self, f"glora_{letter}", None if absent else Support(self.full[letter], kind, r))
        if not zero:
            self.identity_at_birth = "init_weights=False draws the supports"
            for support in self.children():
                support.scatter()  # type: ignore[operator]

    @classmethod
    def build(cls, layer: LinearMap, config: GloraConfig, path: str) -> GLoRA:
        made = cls(layer, config.r, config.config_A_B, config.config_C, config.config_D_E, config.init_weights)
        if not list(made.children()):
            without = "" if layer.bias is not None else ", which has no bias"
            raise ConfigError(
                f"GloraConfig: config_A_B={config.config_A_B!r} leaves nothing to train in {path}{without}; "
                "use 'lora', 'vector' or 'constant', or do not target it",
                field="config_A_B",
                path=path,
                found=config.config_A_B,
            )
        return made

    def adapt(self, weight: Tensor) -> Tensor:
        adapted = weight
        if self.glora_A is not None:
            adapted = adapted + weight * self.glora_A.value
        return adapted if self.glora_B is None else adapted + self.glora_B.value

    def adapted_bias(self, layer: LinearMap) -> Tensor | None:
        bias = layer.bias
        if bias is None:
            return None
        adapted = bias
        if self.glora_C is not None:
            weight = layer.weight
            adapted = adapted + (weight @ self.glora_C.value.to(weight.dtype)).squeeze(-1)
        if self.glora_D is not None:
            adapted = adapted + bias * self.glora_D.value
        return adapted if self.glora_E is None else adapted + self.glora_E.value

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        base, bias, A, B = layer(x), layer.bias, self.glora_A, self.glora_B
        y = base
        if A is not None and A.rank:  # the entrywise product with W has full rank: this matrix has to be built
            y = y + layer.apply(x, layer.weight * A.value).to(y.dtype)
        elif A is not None:  # a scale of the outputs, and so of the bias in `base`
            a = A.value.flatten().expand(layer.out_features)
            y, bias = y + layer.scale(base, a), None if bias is None else bias + bias * a
        if B is not None:
            down, up = (B.Xu, B.Xd) if B.rank else self._rank_one(B.X)
            y = y + layer.mix(layer.apply(x, down), up).to(y.dtype)
        adapted = self.adapted_bias(layer)
        return y if adapted is None or bias is None else shift(y, adapted - bias, layer)

    def _rank_one(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """A column that repeats along the inputs, (out, 1), times a row of ones."""
        out, columns = self.full["B"]
        return X.new_ones(1, columns), X.reshape(-1, 1).expand(out, 1)

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's files hold a zero for every entry of a support that is not there."""
        zeros = {name: tensor for name, tensor in tensors.items() if name.endswith(".zeros")}
        if wrong := [name for name, tensor in zeros.items() if tensor.any()]:
            raise MismatchError(f"{wrong[0]} has numbers other than zero, which no support could hold", key=wrong[0])
        return {name: tensor for name, tensor in tensors.items() if name not in zeros}


METHOD = Method(
    PeftType.GLORA,
    GloraConfig,
    GLoRA,
    key_prefix="glora_",
    default_targets=usual_targets,
    learning_rate=1e-3,
    train_options=all_linear,
)
