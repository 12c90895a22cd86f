"""Arrow: every token goes through the adapters beside the router whose updates it is most aligned with.

y = W x + sum_e c_e s_e B_e A_e x, c = softmax of the top k of |x . v_e| / T, v_e the first right singular vector of
B_e A_e.   https://arxiv.org/abs/2405.11157; subtracting what is general: https://aclanthology.org/2025.acl-short.54
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap
from deltatune.errors import ConfigError, StateError
from deltatune.factors import Factor, at_least_single
from deltatune.lora.variants.kept import Kept
from deltatune.lora.variants.options import Options

if TYPE_CHECKING:
    from deltatune.methods.lora import LoRA

ROUTER = "arrow_router"


@dataclass
class ArrowConfig(Options):
    """Arrow's options, with PEFT's names and defaults; `deltatune.create_arrow_model` makes a model from them.

    Attributes:
        top_k: How many experts a token goes through.
        router_temperature: Of the softmax over their scores.
        use_gks: Subtract the mean of general adapters from every expert (general knowledge subtraction).
        task_adapter_names: The experts that a model was made of. Adapters that are added later are experts too.
        gks_adapter_names: The general adapters.
        rng_seed: Accepted and ignored: singular vectors are worked out, not iterated from a random start.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def validate(self) -> None:
        checks.positive_int("ArrowConfig", "top_k", self.top_k)
        checks.finite_positive("ArrowConfig", "router_temperature", self.router_temperature)
        if not isinstance(self.use_gks, bool):
            checks.refuse("ArrowConfig", "use_gks", self.use_gks, "bool")


class Router(Adapter):
    """Trains nothing. Its factors A and B, which nothing reads, stand in files because PEFT's have them."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    identity_at_birth: bool | str = "its experts are trained already"
    mergeable: bool | str = "every token has experts of its own"
    views: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "r", "scaling", "lora_alpha", "lora_dropout")

    beside: nn.ModuleDict

    def __init__(self, layer: LinearMap, r: int, alpha: float, dropout: float, options: ArrowConfig) -> None:
        super().__init__()
        self.r, self.lora_alpha, self.scaling = r, alpha, alpha / r
        self.top_k, self.temperature = options.top_k, options.router_temperature
        self.general = tuple(options.gks_adapter_names or ()) if options.use_gks else ()
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A, self.lora_B = Factor(*layer.down_shape(r)), Factor(*layer.up_shape(r))
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)
        self.kept = Kept()

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str) -> Router:
        if layer.kind != "linear":
            raise ConfigError(
                f"LoraConfig: arrow_config routes tokens, and {path} is a layer of kind {layer.kind!r}; "
                "take it out of target_modules",
                field="arrow_config",
                path=path,
            )
        return cls(layer, config.r, config.lora_alpha, config.lora_dropout, config.arrow_config)

    def joins(self, beside: nn.ModuleDict) -> None:
        vars(self)["beside"] = beside  # past nn.Module: they are no part of this one

    def requires_grad_(self, requires_grad: bool = True) -> Router:
        self.kept.drop()
        return super().requires_grad_(False)

    def experts(self) -> Iterator[tuple[str, LoRA]]:
        for name, adapter in self.beside.items():
            if isinstance(adapter, type(self)) or name in self.general:
                continue
            yield name, _summand(name, adapter)

    def forward(self, x: Tensor, layer: LinearMap) -> Tensor:
        y, experts = layer(x), [expert for _, expert in self.experts()]
        if not experts:
            return y
        A, B, prototypes = self._of(experts)
        scores = (x.to(prototypes.dtype) @ prototypes.mT).abs()  # (..., experts); singular vectors have no sign
        best = scores.topk(min(self.top_k, len(experts)), dim=-1)
        weights = (best.values / self.temperature).softmax(dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, best.indices, weights)
        weights = (weights * weights.new_tensor([expert.scaling for expert in experts])).to(x.dtype)
        ranks = torch.tensor([len(a) for a in A], device=x.device)
        h = F.linear(x, torch.cat(A).to(x.dtype)) * weights.repeat_interleave(ranks, dim=-1)
        update = F.linear(h, torch.cat(B, dim=1).to(x.dtype))
        for index, expert in enumerate(experts):
            if expert.lora_B.bias is not None:
                update = update + weights[..., index, None] * expert.lora_B.bias.to(x.dtype)
        return y + self.lora_dropout(update).to(y.dtype)

    def _of(self, experts: list[LoRA]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The experts' factors, without what is general, and their first right singular vectors (experts, in)."""
        general = [_summand(name, self.beside[name]) for name in self.general if name in self.beside]
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return _worked_out(experts, general)
        stamp = Kept.of(p for adapter in (*experts, *general) for p in adapter.parameters())
        found = self.kept.get(stamp)
        if found is None:
            found = _worked_out(experts, general)
            self.kept.put(stamp, found)
        return found

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, temperature={self.temperature:g}"


def _worked_out(experts: list[LoRA], general: list[LoRA]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    A, B = [expert.A for expert in experts], [expert.B for expert in experts]
    if general:
        mean_A = torch.stack([adapter.A for adapter in general]).mean(dim=0)
        mean_B = torch.stack([adapter.B for adapter in general]).mean(dim=0)
        A, B = [a - mean_A for a in A], [b - mean_B for b in B]
    return A, B, torch.stack([first_right_singular_vector(a, b) for a, b in zip(A, B)])


def _summand(name: str, adapter: Any) -> LoRA:
    from deltatune.methods.lora import LoRA

    reason = adapter.summand if isinstance(adapter, LoRA) else f"it is a {type(adapter).__name__}"
    if reason is not True:
        raise StateError(
            f"adapter {name!r} cannot be an expert of the Arrow router beside it: {reason}; delete it, or activate it "
            "instead of the router",
            field="arrow_config",
            found=name,
        )
    return adapter


@torch.no_grad()
def first_right_singular_vector(A: Tensor, B: Tensor) -> Tensor:
    """Of B A, (in,): A^T R w for R = (B^T B)^(1/2) and the first eigenvector w of R A A^T R, matrices (r, r)."""
    wide = at_least_single(A)
    A, B = A.to(wide), B.to(wide)
    values, vectors = torch.linalg.eigh((B.mT @ B).double())
    R = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    w = torch.linalg.eigh(R @ (A @ A.mT).double() @ R).eigenvectors[:, -1]
    return F.normalize(A.mT @ (R @ w).to(wide), dim=0)
