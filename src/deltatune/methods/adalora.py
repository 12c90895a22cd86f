"""AdaLoRA: W' = W + alpha / r B diag(E) A, ranks moving to where they matter.   https://arxiv.org/abs/2303.10512"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks, replication
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.notice import warn
from deltatune.schedule import Schedule, Sensitivity, falling

# Options that PEFT's AdaLoraConfig inherits from LoraConfig, and the values with which they ask for nothing.
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
class AdaLoraConfig(LayerConfig):
    """AdaLoRA's options, with PEFT's names and defaults.

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
    unsaved: ClassVar[frozenset[str]] = frozenset({"runtime_config"})

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict | None = None
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
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False
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
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        owner = "AdaLoraConfig"
        for name in ("init_r", "target_r", "deltaT"):
            checks.positive_int(owner, name, getattr(self, name))
        checks.finite_positive(owner, "lora_alpha", self.lora_alpha)
        checks.probability(owner, "lora_dropout", self.lora_dropout)
        biases.check(owner, self.bias, "lora_only")
        replication.check(owner, self.layer_replication)
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
        left = _of_layer(config.rank_pattern, path)
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


class Ranks(Schedule):
    """Takes ranks away from where they matter least, over all layers, down to `target_r` on the average."""

    adapters: dict[str, AdaLoRA]

    def __init__(self, name: str, configs: dict[str, Any], adapters: dict[str, AdaLoRA]) -> None:
        super().__init__(name, configs, adapters)  # type: ignore[arg-type]
        self.sensitivity = Sensitivity(self.config.beta1, self.config.beta2)
        self.all = sum(adapter.r for adapter in adapters.values())
        self.target = self.config.target_r * len(adapters)
        self.before: dict[str, list[bool]] | None = self.config.rank_pattern  # of ranks that an earlier training left
        for adapter in adapters.values():
            adapter.layers = len(adapters)
        if self.config.target_r > self.config.init_r and not self.config.inference_mode:
            warn(
                f"AdaLoraConfig: target_r={self.config.target_r} is more than init_r={self.config.init_r}, so no rank "
                "is ever taken away; set target_r below init_r"
            )
        if self.config.r != 8 and self.config.init_r == 12 and not self.config.inference_mode:
            warn(f"AdaLoraConfig: r={self.config.r} is not used; init_r=12 and target_r={self.config.target_r} are")

    def after_step(self) -> None:
        plan, step = self.config, self.step
        end = plan.total_step - plan.tfinal
        if step < end:
            self.require_gradients()
            self.sensitivity.update(self.parameters())
            if step > plan.tinit and step % plan.deltaT == 0:
                self._keep(falling(step, plan.tinit, end, self.all, self.target))
            return
        if any(adapter.kept is None for adapter in self.adapters.values()):  # the step in which it is decided
            for adapter, left in zip(self.adapters.values(), self._keep(self.target)):
                adapter.kept = left.tolist()
            self.sensitivity.forget()
            self._tell()
        for adapter in self.adapters.values():
            adapter.lora_E.masked_fill_(~torch.tensor(adapter.kept, device=adapter.lora_E.device)[:, None], 0.0)

    def _keep(self, budget: int) -> list[Tensor]:
        """Singular values outside of the `budget` most important ones become zero; which are left, layer by layer."""
        scores = [self._scores(path, adapter) for path, adapter in self.adapters.items()]
        joined = torch.cat([score.to(scores[0].device) for score in scores])
        left = torch.zeros_like(joined, dtype=torch.bool)
        # of equals the first ones stay: so many are left as the budget says
        left[joined.sort(descending=True, stable=True).indices[: max(budget, 0)]] = True
        parts = list(left.split([len(score) for score in scores]))
        for adapter, part in zip(self.adapters.values(), parts):
            adapter.lora_E.masked_fill_(~part.to(adapter.lora_E.device)[:, None], 0.0)
        return parts

    def _scores(self, path: str, adapter: AdaLoRA) -> Tensor:
        """Equation (7): of a singular value, and the means over its two vectors."""
        if not self.sensitivity.mean:  # no step before the last allocation
            return adapter.lora_E[:, 0].abs()
        a, e, b = (
            self.sensitivity.of(f"{path}.{name}", tensor)
            for name, tensor in (("lora_A", adapter.lora_A), ("lora_E", adapter.lora_E), ("lora_B", adapter.lora_B))
        )
        return e[:, 0] + (a.mean(1) + b.mean(0))

    def _tell(self) -> None:
        """The config, and so the file, says which ranks are left."""
        told = copy.copy(self.config)
        told.rank_pattern = self.before
        if all(adapter.kept is not None for adapter in self.adapters.values()):
            told.rank_pattern = {
                f"{path}.lora_E": _within(_of_layer(self.before, path), adapter.kept or [])
                for path, adapter in self.adapters.items()
            }
        self.configs[self.name] = told

    def state_dict(self) -> dict[str, Any]:
        kept = {path: adapter.kept for path, adapter in self.adapters.items() if adapter.kept is not None}
        return {**super().state_dict(), **self.sensitivity.state_dict(), "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sensitivity.load_state_dict(state)
        for path, adapter in self.adapters.items():
            adapter.kept = state["kept"].get(path)
        self._tell()


def _of_layer(pattern: Mapping[str, list[bool]] | None, path: str) -> list[bool] | None:
    """The entry of a layer, whose key is `path.lora_E`, perhaps with an adapter's name behind it."""
    return next((list(kept) for key, kept in (pattern or {}).items() if key.rpartition(".lora_E")[0] == path), None)


def _within(before: list[bool] | None, now: list[bool]) -> list[bool]:
    """Which of all ranks are left, if `before` says which there were, and `now` which of those are."""
    left = iter(now)
    return now if before is None else [was and next(left) for was in before]


def _run_options(given: dict[str, Any], steps: int) -> dict[str, Any]:
    """A tenth of the run to warm up, three tenths with the final ranks, a hundred allocations in between."""
    total = given.get("total_step") or steps
    return {
        "total_step": total,
        "tinit": total // 10,
        "tfinal": 3 * total // 10,
        "deltaT": max(1, total // 160),
    }


METHOD = Method(
    PeftType.ADALORA,
    AdaLoraConfig,
    AdaLoRA,
    key_prefix="lora_",
    default_targets=usual_targets,
    learning_rate=1e-3,
    train_options=all_linear,
    run_options=_run_options,
    schedule=Ranks,
)
