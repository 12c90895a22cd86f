"""LoRA: W' = W + (alpha / r) B A.   https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks, replication, tying
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import Factor, block_diagonal, shift
from deltatune.methods import trainable_tokens
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.patterns import pattern_value

# Options of PEFT's LoraConfig that this version reads, writes and accepts only at the value that asks for nothing.
_NOT_BUILT: dict[str, Any] = {
    "megatron_config": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}


@config
class LoraConfig(LayerConfig):
    """LoRA's options, with PEFT's names and defaults.

    Attributes:
        r: Rank of the update.
        lora_alpha: The update is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with `use_rslora`
            (https://arxiv.org/abs/2312.03732).
        lora_dropout: Dropout on the input of A, in training.
        init_lora_weights: True: A uniform (Kaiming), B zero. "gaussian": A ~ N(0, 1/r), B zero. False: both random, so
            that a fresh adapter changes the output.
        rank_pattern: Layer name or regular expression -> another rank; `alpha_pattern` likewise.
        layer_replication: [(start, end), ...], runs of layers that make a deeper model. Replicas share their weights,
            and have adapters of their own.
        bias: "lora_only" trains the biases of the adapted layers too, "all" every one of the model: a copy per adapter.
        lora_bias: B has a bias of its own.
        trainable_token_indices: Tokens whose embeddings are trained too, as rows of the input embedding, or
            {layer name: tokens} (`deltatune.methods.trainable_tokens`).
        target_parameters: Parameters that hold the weights of experts, by the end of their paths (`experts.down_proj`).
            Without usual layers of the architecture, or with `target_modules=[]`, they alone are adapted.
        ensure_weight_tying: What is trained of the input embedding (an adapter, or all of it under `modules_to_save`)
            is trained of the layers that share its weight too (`deltatune.tying`).
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    retired: ClassVar[dict[str, tuple[Any, ...]]] = {"enable_lora": (None,), "merge_weights": (None, False)}
    unsaved: ClassVar[frozenset[str]] = frozenset({"runtime_config"})
    adapts_parameters: ClassVar[bool] = True

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict | None = None
    loftq_config: dict = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None  # type: ignore[misc]  # a ClassVar in configs of other methods
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("LoraConfig", "r", self.r)
        checks.finite_positive("LoraConfig", "lora_alpha", self.lora_alpha)
        checks.probability("LoraConfig", "lora_dropout", self.lora_dropout)
        biases.check("LoraConfig", self.bias, "lora_only")
        replication.check("LoraConfig", self.layer_replication)
        checks.one_of("LoraConfig", "init_lora_weights", self.init_lora_weights, (True, False, None, "gaussian"))
        self.beside()
        for name, inert in _NOT_BUILT.items():
            if getattr(self, name) != inert:
                raise ConfigError(
                    f"LoraConfig: {name}={getattr(self, name)!r} is not available in this version, "
                    f"leave it at {inert!r}",
                    field=name,
                    found=getattr(self, name),
                    expected=inert,
                )

    def beside(self) -> list[tuple[Method, LayerConfig]]:
        return trainable_tokens.beside(self.trainable_token_indices)


class LoRA(Adapter):
    """Trainable: A (r, in) and B (out, r), r (in + out) numbers."""

    views: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
        *("scaling", "r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias"),
    )

    lora_A: Factor
    lora_B: Factor
    ties = False  # layers that share an embedding's weight follow it

    def __init__(
        self, layer: LinearMap, r: int, alpha: float, dropout: float, rslora: bool, init: bool | str, bias: bool
    ) -> None:
        super().__init__()
        self.r, self.lora_alpha, self.use_rslora, self.lora_bias = r, alpha, rslora, bias
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = Factor(*layer.down_shape(r))
        self.lora_B = Factor(*layer.up_shape(r), bias=layer.out_features if bias else None)
        self.blocks = r // self.lora_B.matrix.shape[1]  # more than one under a grouped convolution
        self.embedding = layer.kind == "embedding"
        if init is False:
            self.identity_at_birth = "init_lora_weights=False draws both factors"
        self._start(init)

    @classmethod
    def build(cls, layer: LinearMap, config: LoraConfig, path: str) -> LoRA:
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        init = True if config.init_lora_weights is None else config.init_lora_weights
        if config.lora_bias and layer.kind == "embedding":
            raise ConfigError(
                f"LoraConfig: lora_bias=True is not possible for the embedding {path}: files have no name for it",
                field="lora_bias",
                path=path,
                found=True,
            )
        _check_groups(layer, r, path)
        made = cls(layer, r, alpha, config.lora_dropout, config.use_rslora, init, config.lora_bias)
        made.ties = config.ensure_weight_tying
        return made

    def tied(self, layer: LinearMap, config: Any = None) -> Adapter | None:
        own = config is None or isinstance(config, LoraConfig)
        return tying.follow(self, layer) if self.ties and own else None

    def _start(self, init: bool | str) -> None:
        A, B = self.lora_A.weight, self.lora_B.weight
        if self.embedding and init is True:  # as PEFT: one side of the update is zero, here it is A
            nn.init.zeros_(A)
            nn.init.normal_(B)
            return
        if init == "gaussian":
            nn.init.normal_(A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as nn.Linear does
        if init is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        else:
            nn.init.zeros_(B)

    @property
    def A(self) -> Tensor:
        return self.lora_A.matrix

    @property
    def B(self) -> Tensor:
        return block_diagonal(self.lora_B.matrix, self.blocks)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.scaling * (self.B @ self.A).to(_wider(weight, self.A))

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        own = self.lora_B.bias
        if own is None:
            return bias
        return self.scaling * own if bias is None else bias + self.scaling * own

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y = layer(x)
        return y + self.update(x, layer).to(y.dtype)

    def update(self, x: Any, layer: LinearMap) -> Tensor:
        """What is added to the layer's output."""
        x = x if self.embedding else self.lora_dropout(x)  # an embedding reads indices
        update = layer.mix(layer.apply(x, self.A), self.B)
        if self.lora_B.bias is not None:
            update = shift(update, self.lora_B.bias, layer)
        return self.scaling * update

    # Files call the factors of an embedding by names of their own, without `.weight`.

    def file_tensors(self) -> dict[str, Tensor]:
        if self.embedding:
            return {"lora_embedding_A": self.lora_A.weight, "lora_embedding_B": self.lora_B.weight}
        return super().file_tensors()

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.file_tensors().items():
            parameter.data.copy_(tensors[name])

    @property
    def lora_embedding_A(self) -> Tensor | None:
        return self.lora_A.weight if self.embedding else None

    @property
    def lora_embedding_B(self) -> Tensor | None:
        return self.lora_B.weight if self.embedding else None

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def _wider(weight: Tensor, factor: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, factor.dtype)


def _check_groups(layer: LinearMap, r: int, path: str) -> None:
    groups = layer.module.groups if layer.kind == "conv" else 1  # type: ignore[attr-defined]
    if r % groups:
        nearest = max(groups, r - r % groups)
        raise ConfigError(
            f"LoraConfig: r={r} does not divide by groups={groups} of the convolution {path}; use r={nearest}",
            field="r",
            found=r,
            expected=nearest,
        )


def _train_options(given: dict[str, Any]) -> dict[str, Any]:
    rank = given.get("r", 8)
    return {**all_linear(given), "r": rank, "lora_alpha": 2 * rank if isinstance(rank, int) else rank}


METHOD = Method(
    PeftType.LORA,
    LoraConfig,
    LoRA,
    key_prefix="lora_",
    default_targets=usual_targets,
    learning_rate=2e-4,
    train_options=_train_options,
    pairs="lora",
)
