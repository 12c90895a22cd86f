"""LoRA: W' = W + (alpha / r) B A.   https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import Factor, block_diagonal, shift, unblocked
from deltatune.filling import Source, source
from deltatune.lora import options, starts
from deltatune.lora.options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig
from deltatune.lora.stacked import NAMES, START_A, START_B, for_peers, unstacked
from deltatune.lora.starts import Site, Start
from deltatune.methods import trainable_tokens
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.patterns import pattern_value
from deltatune.storage.derived import in_waves

# Options of PEFT's LoraConfig that this version reads, writes and accepts only at the value that asks for nothing.
_NOT_BUILT: dict[str, Any] = {
    "bias": "none",
    "megatron_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}


@config
class LoraConfig(LayerConfig):
    """LoRA's options, with PEFT's names and defaults.

    Attributes:
        r: Rank of the update.
        lora_alpha: The update is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with `use_rslora`
            (https://arxiv.org/abs/2312.03732).
        lora_dropout: Dropout on the input of A, in training.
        init_lora_weights: Where A and B begin (`deltatune.lora.starts`, one file each). True: A uniform (Kaiming), B
            zero. "gaussian": A ~ N(0, 1/r^2), B zero. "orthogonal": neither zero, their product is. "pissa",
            "pissa_niter_4" (fast), "olora": parts of W. "mica": B from W, fixed. "loftq": what quantising loses. From
            data (`deltatune.lora.prepare`): "eva", "corda", "lora_ga". False: both random, so that a fresh adapter
            changes the output.
        loftq_config: `LoftQConfig` or a dict; `eva_config`, `corda_config`, `lora_ga_config` likewise
            (`deltatune.lora.options`).
        rank_pattern: Layer name or regular expression -> another rank; `alpha_pattern` likewise.
        lora_bias: B has a bias of its own.
        trainable_token_indices: Tokens whose embeddings are trained too, as rows of the input embedding, or
            {layer name: tokens} (`deltatune.methods.trainable_tokens`).
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    retired: ClassVar[dict[str, tuple[Any, ...]]] = {"enable_lora": (None,), "merge_weights": (None, False)}
    unsaved: ClassVar[frozenset[str]] = frozenset({"runtime_config"})

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
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | dict | None = None
    corda_config: CordaConfig | dict | None = None
    lora_ga_config: LoraGAConfig | dict | None = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list | None = None
    runtime_config: LoraRuntimeConfig | dict | None = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        options.settle(self)
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("LoraConfig", "r", self.r)
        checks.finite_positive("LoraConfig", "lora_alpha", self.lora_alpha)
        checks.probability("LoraConfig", "lora_dropout", self.lora_dropout)
        starts.check(self.init_lora_weights)
        options.fill_in(self)
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
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self, layer: LinearMap, r: int, alpha: float, dropout: float, rslora: bool, start: Start, bias: bool
    ) -> None:
        super().__init__()
        self.r, self.lora_alpha, self.use_rslora, self.lora_bias = r, alpha, rslora, bias
        self.scaling = scaling(r, alpha, rslora)
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = Factor(*layer.down_shape(r))
        self.lora_B = Factor(*layer.up_shape(r), bias=layer.out_features if bias else None, fixed=start.fixed_B)
        self.blocks = r // self.lora_B.matrix.shape[1]  # more than one under a grouped convolution
        self.embedding = layer.kind == "embedding"
        self._begin(start)

    @classmethod
    def build(cls, layer: LinearMap, config: LoraConfig, path: str) -> LoRA:
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        if config.lora_bias and layer.kind == "embedding":
            raise ConfigError(
                f"LoraConfig: lora_bias=True is not possible for the embedding {path}: files have no name for it",
                field="lora_bias",
                path=path,
                found=True,
            )
        _check_groups(layer, r, path)
        start = starts.begin(Site(layer, r, scaling(r, alpha, config.use_rslora), config, path))
        return cls(layer, r, alpha, config.lora_dropout, config.use_rslora, start, config.lora_bias)

    def _begin(self, start: Start) -> None:
        wide = torch.promote_types(start.A.dtype, torch.float32)
        A, B = start.A.to(wide).contiguous(), start.B.to(wide).contiguous()
        self.lora_A.weight.data = A.reshape(self.lora_A.weight.shape)
        self.lora_B.weight.data = unblocked(B, self.blocks).contiguous().reshape(self.lora_B.weight.shape)
        self.identity_at_birth, self.stand_in = start.at_birth, start.stand_in
        self.replaces = start.stand_in is not None  # type: ignore[misc]
        self.keeps_derived = start.gives_way and not start.again
        for name, factor in (("start_A", A), ("start_B", B)):
            self.register_buffer(name, factor.clone() if start.gives_way else None, persistent=self.keeps_derived)

    @property
    def A(self) -> Tensor:
        return self.lora_A.matrix

    @property
    def B(self) -> Tensor:
        return block_diagonal(self.lora_B.matrix, self.blocks)

    @property
    def change(self) -> Tensor:
        """B A, less the frozen B0 A0 where the base gives way: exactly zero at the start, and precise near it."""
        A, B = self.A, self.B
        if self.start_A is None or self.start_B is None:
            return B @ A
        return (B - self.start_B) @ A + self.start_B @ (A - self.start_A)

    def adapt(self, weight: Tensor) -> Tensor:
        weight = weight if self.stand_in is None else self.stand_in.weight  # type: ignore[assignment]
        return weight + self.scaling * self.change.to(_wider(weight, self.A))

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        own = self.lora_B.bias
        if own is None:
            return bias
        return self.scaling * own if bias is None else bias + self.scaling * own

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y = layer(x) if self.stand_in is None else layer.apply(x, self.stand_in.weight, layer.bias)  # type: ignore[arg-type]
        return y + self.update(x, layer).to(y.dtype)

    def update(self, x: Any, layer: LinearMap) -> Tensor:
        """What is added to the layer's output."""
        dropped = x if self.embedding else self.lora_dropout(x)  # an embedding reads indices
        update = self._product(x, dropped, layer)
        if self.lora_B.bias is not None:
            update = shift(update, self.lora_B.bias, layer)
        return self.scaling * update

    def _product(self, x: Any, dropped: Any, layer: LinearMap) -> Tensor:
        """`change` on the input; what the base gave way by sees all of it, as the base does."""
        h = layer.apply(dropped, self.A)
        if self.start_A is None or self.start_B is None:
            return layer.mix(h, self.B)
        moved = layer.apply(x, self.A - self.start_A) if dropped is x else h - layer.apply(x, self.start_A)
        return layer.mix(h, self.B - self.start_B) + layer.mix(moved, self.start_B)

    # Files call the factors of an embedding by names of their own, without `.weight`.

    def file_tensors(self) -> dict[str, Tensor]:
        names = NAMES[self.embedding]
        bias = {} if self.lora_B.bias is None else {"lora_B.bias": self.lora_B.bias}
        return {names[0]: self.lora_A.weight, names[1]: self.lora_B.weight, **bias, **self.kept_tensors()}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.start_A is None or self.start_B is None:
            return tensors
        found = unstacked(tensors, self.r, NAMES[self.embedding])
        if self.keeps_derived and source() is Source.PEER:  # data have been collected once more for a file of PEFT
            return {START_A: self.start_A, START_B: self.start_B, **found}
        if self.keeps_derived and self.embedding and found.get(NAMES[True][0], self.A).shape == self.A.shape:
            zero = {START_A: torch.zeros_like(self.start_A), START_B: torch.zeros_like(self.start_B)}
            return {**zero, **found}  # one that came from PEFT, which starts embeddings plainly
        return found

    def derived_tensors(self) -> dict[str, Tensor]:
        frozen = {} if self.start_A is None else {START_A: self.start_A, START_B: self.start_B}
        fixed = {} if isinstance(self.lora_B.weight, nn.Parameter) else {NAMES[self.embedding][1]: self.lora_B.weight}
        return {**frozen, **fixed}  # type: ignore[dict-item]

    def kept_tensors(self) -> dict[str, Tensor]:
        derived = self.derived_tensors()
        return {name: derived[name] for name in derived if self.keeps_derived or name not in (START_A, START_B)}

    def checked_tensors(self) -> dict[str, Tensor]:
        """Of Q and of B0 A0, which is all that counts of its factors, whatever their signs and order."""
        if self.stand_in is not None:
            return {"lora_stand_in": in_waves(self.stand_in.weight)}  # type: ignore[arg-type]
        if self.start_A is None or self.start_B is None or self.keeps_derived:
            return {}
        return {"lora_start": self.start_B.float() @ in_waves(self.start_A)}

    @property
    def lora_embedding_A(self) -> Tensor | None:
        return self.lora_A.weight if self.embedding else None

    @property
    def lora_embedding_B(self) -> Tensor | None:
        return self.lora_B.weight if self.embedding else None

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def scaling(r: int, alpha: float, rslora: bool) -> float:
    return alpha / math.sqrt(r) if rslora else alpha / r


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
    for_peers=for_peers,
)
