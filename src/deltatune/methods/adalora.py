"""AdaLoRA: W' = W + alpha / r B diag(E) A, ranks moving to where they matter.   https://arxiv.org/abs/2303.10512"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.lora.config import LoraConfig
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.schedules.adalora import Ranks, of_layer, run_options

# Options of LoRA, and the values with which they ask for nothing.
_INHERITED: dict[str, Any] = {
    "megatron_config": None,
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}


@config
class AdaLoraConfig(LoraConfig):
    """AdaLoRA's options, with PEFT's names and defaults, LoRA's among them, most of which are refused.

    Attributes:
        total_step: Optimizer steps of the whole training; has to be given.
        target_r: Average rank that is left in the end; `init_r` is every layer's rank in the beginning.
        tinit: Steps before the first rank is taken away; `tfinal` those after the last one, `deltaT` those in between.
        beta1: How slowly the sensitivity of a number follows its present value; `beta2` likewise for its uncertainty.
        orth_reg_weight: Weight of the penalty that keeps the rows of A and the columns of B orthonormal.
        rank_pattern: Layer -> which of its `init_r` ranks are left. Written when training has decided it.
        lora_alpha: The update is scaled by lora_alpha / init_r.
        lora_dropout: Dropout on the input of A, in training.
        init_lora_weights: True: A and B ~ N(0, 0.02), E zero. False: all from N(0, 1), so that a fresh adapter changes
            the output.
        r: Not used, nor are `use_rslora` and `alpha_pattern`, as in PEFT.
    """

    rank_name: ClassVar[str] = "init_r"
    not_by_layer: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    alike_in_swap: ClassVar[tuple[str, ...]] = ()
    adapts_parameters: ClassVar[bool] = False

    rank_pattern: dict | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        self.peft_type = PeftType.ADALORA
        LayerConfig.__post_init__(self)  # LoRA's own would bring options into shape that are refused here

    def validate(self) -> None:
        self.validate_common()
        owner = "AdaLoraConfig"
        for name in ("init_r", "target_r", "deltaT"):
            checks.positive_int(owner, name, getattr(self, name))
        checks.one_of(owner, "init_lora_weights", self.init_lora_weights, (True, False, None, "gaussian"))
        if self.total_step is None or self.total_step < 1:
            checks.refuse(owner, "total_step", self.total_step, "the number of optimizer steps of the whole training")
        for name in ("tinit", "tfinal", "orth_reg_weight"):
            if not getattr(self, name) >= 0:
                checks.refuse(owner, name, getattr(self, name), "0 or more")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                checks.refuse(owner, name, getattr(self, name), "a number between 0 and 1")
        if self.tinit + self.tfinal >= self.total_step:
            expected = (
                f"less than total_step - tfinal = {self.total_step - self.tfinal}, so that ranks can be taken away"
            )
            checks.refuse(owner, "tinit", self.tinit, expected)
        for layer, kept in (self.rank_pattern or {}).items():
            if not isinstance(kept, (list, tuple)) or not all(isinstance(part, bool) for part in kept):
                checks.refuse(owner, f"rank_pattern[{layer!r}]", kept, "a list of true and false, one for each rank")
            if len(kept) != self.init_r:
                checks.refuse(owner, f"rank_pattern[{layer!r}]", kept, f"init_r={self.init_r} values")
        for name, inert in _INHERITED.items():
            if getattr(self, name) != inert:
                checks.refuse(owner, name, getattr(self, name), f"{inert!r}: AdaLoRA is not combined with it")


class AdaLoRA(Adapter):
    """Trainable: A (r, in), E (r, 1) and B (out, r), r (in + out + 1) numbers.

    Attributes:
        ranknum: init_r, however many ranks are left.
        kept: Which of the ranks are left once that is decided. The others are zero and not saved.
        layers: Of the model, among which the penalty is averaged.
    """

    stacks = ("scale",)
    views: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E", "r", "ranknum", "scaling", "lora_alpha")

    def __init__(self, layer: LinearMap, r: int, init_r: int, alpha: float, dropout: float, weight: float) -> None:
        super().__init__()
        self.r, self.ranknum, self.scaling, self.lora_alpha, self.weight = r, init_r, alpha, alpha, weight
        self.kept: list[bool] | None = None
        self.layers = 1
        self.embedding = layer.kind == "embedding"
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Parameter(torch.randn(r, layer.in_features))
        self.lora_E = nn.Parameter(torch.randn(r, 1))
        self.lora_B = nn.Parameter(torch.randn(layer.out_features, r))
        torch.randn(1)  # PEFT draws its count of ranks too: equal seeds give equal adapters

    @classmethod
    def build(cls, layer: LinearMap, config: AdaLoraConfig, path: str) -> AdaLoRA:
        left = of_layer(config.rank_pattern, path)
        r = config.init_r if left is None else sum(left)
        made = cls(layer, r, config.init_r, config.lora_alpha, config.lora_dropout, config.orth_reg_weight)
        if config.init_lora_weights:
            nn.init.normal_(made.lora_A, std=0.02)
            nn.init.zeros_(made.lora_E)
            nn.init.normal_(made.lora_B, std=0.02)
        else:
            made.identity_at_birth = "init_lora_weights=False draws the singular values"
        return made

    @property
    def scale(self) -> float:
        return self.scaling / (self.ranknum + 1e-5)  # as PEFT

    def adapt(self, weight: Tensor) -> Tensor:
        update = self.scale * (self.lora_B @ (self.lora_E * self.lora_A))
        return weight + update.to(torch.promote_types(weight.dtype, update.dtype))

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        return self.scale * self.lora_B, self.lora_E * self.lora_A

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y = layer(x)
        x = x if self.embedding else self.lora_dropout(x)  # an embedding reads indices
        update = layer.mix(layer.apply(x, self.lora_E * self.lora_A), self.lora_B)
        return y + (self.scale * update).to(y.dtype)

    def penalty(self) -> Tensor | None:
        """Equation (4), as the authors' code has it: the mean of all ||A A^T - I|| and ||B^T B - I||, not squared."""
        if not self.weight:
            return None
        eye = torch.eye(self.r, device=self.lora_A.device, dtype=self.lora_A.dtype)
        norms = [(gram - eye).norm() for gram in (self.lora_A @ self.lora_A.mT, self.lora_B.mT @ self.lora_B)]
        return self.weight * (norms[0] + norms[1]) / (2 * self.layers)

    # Files hold the ranks that are left.

    def file_tensors(self) -> dict[str, Tensor]:
        if self.kept is None:
            return super().file_tensors()
        return {"lora_A": self.lora_A[self.kept], "lora_E": self.lora_E[self.kept], "lora_B": self.lora_B[:, self.kept]}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        left = [True] * self.r if self.kept is None else self.kept
        self.lora_A.data[left] = tensors["lora_A"].to(self.lora_A)
        self.lora_E.data[left] = tensors["lora_E"].to(self.lora_E)
        self.lora_B.data[:, left] = tensors["lora_B"].to(self.lora_B)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}"


METHOD = Method(
    PeftType.ADALORA,
    AdaLoraConfig,
    AdaLoRA,
    key_prefix="lora_",
    default_targets=usual_targets,
    learning_rate=1e-3,
    train_options=all_linear,
    run_options=run_options,
    schedule=Ranks,
)
