"""What a user sets of LoRA: `LoraConfig`."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

from deltatune import biases, checks, manners, replication
from deltatune.adapter import Method
from deltatune.config import PeftType, config
from deltatune.lora import options, parameters, starts
from deltatune.lora.options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig
from deltatune.lora.variants import check_variants
from deltatune.lora.variants.arrow import ArrowConfig
from deltatune.lora.variants.bdlora import BdLoraConfig
from deltatune.lora.variants.kasa import KasaConfig
from deltatune.lora.variants.monteclora import MontecloraConfig
from deltatune.lora.variants.velora import VeloraConfig
from deltatune.methods import trainable_tokens
from deltatune.methods.common import LayerConfig

MEGATRON = ("megatron.core", None)  # what PEFT imports by the name in the config; here a name that may stand there


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
        layer_replication: [(start, end), ...], runs of layers that make a deeper model. Replicas share their weights,
            and have adapters of their own.
        bias: "lora_only" trains the biases of the adapted layers too, "all" every one of the model: a copy per adapter.
        lora_bias: B has a bias of its own.
        use_dora: Train the length of every row of the weight apart from its direction.
        use_bdlora: A or B is block-diagonal (`BdLoraConfig`).
        use_qalora: A reads sums over groups of `qalora_group_size` inputs.
        kasa_config: Trained singular values, in place of the weight's smallest (`KasaConfig`).
        monteclora_config: A is sampled in training (`MontecloraConfig`).
        velora_config: Inputs are kept compressed for the gradient of A (`VeloraConfig`).
        alora_invocation_tokens: The adapter acts from the last occurrence of these tokens on.
        arrow_config: A router over other adapters (`ArrowConfig`, `deltatune.create_arrow_model`); it stands alone, the
            other variants go together.
        trainable_token_indices: Tokens whose embeddings are trained too, as rows of the input embedding, or
            {layer name: tokens} (`deltatune.methods.trainable_tokens`).
        target_parameters: Parameters that hold the weights of experts, by the end of their paths (`experts.down_proj`).
            Without usual layers of the architecture, or with `target_modules=[]`, they alone are adapted.
        ensure_weight_tying: What is trained of the input embedding (an adapter, or all of it under `modules_to_save`)
            is trained of the layers that share its weight too (`deltatune.tying`).
        megatron_config, megatron_core: Accepted and kept: Megatron's layers are known by their class, so nothing has to
            be told of them, and no module is imported by the name that a file gives.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    alike_in_swap: ClassVar[tuple[str, ...]] = ("lora_dropout", "use_dora", "lora_bias")
    retired: ClassVar[dict[str, tuple[Any, ...]]] = {"enable_lora": (None,), "merge_weights": (None, False, True)}
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
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | dict | None = None
    corda_config: CordaConfig | dict | None = None
    lora_ga_config: LoraGAConfig | dict | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | dict | None = None
    layer_replication: list | None = None
    runtime_config: LoraRuntimeConfig | dict | None = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None  # type: ignore[misc]  # a ClassVar in configs of other methods
    use_bdlora: BdLoraConfig | dict | None = None
    arrow_config: ArrowConfig | dict | None = None
    kasa_config: KasaConfig | dict | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        options.settle(self)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if manners.as_peft:
            del values["runtime_config"]
        return values

    def validate(self) -> None:
        checks.positive_int("LoraConfig", "r", self.r)  # first: alpha is often set by it
        self.validate_common()
        starts.check(self.init_lora_weights)
        parameters.check(self)
        checks.one_of("LoraConfig", "megatron_core", self.megatron_core, MEGATRON)
        options.fill_in(self)
        self.beside()
        check_variants(self)

    def validate_common(self) -> None:
        """What AdaLoRA's options have to be too."""
        LayerConfig.validate(self)
        owner = type(self).__name__
        checks.finite_positive(owner, "lora_alpha", self.lora_alpha)
        checks.probability(owner, "lora_dropout", self.lora_dropout)
        biases.check(owner, self.bias, "lora_only")
        replication.check(owner, self.layer_replication)

    def beside(self) -> list[tuple[Method, LayerConfig]]:
        return trainable_tokens.beside(self.trainable_token_indices)
