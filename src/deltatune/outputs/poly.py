"""Poly: y_i = W x_i + B_i A_i x_i / r, where A_i, B_i mix shared skills by the task of row i.

https://arxiv.org/abs/2202.13914; with splits, multi-head routing: https://arxiv.org/abs/2211.03831
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.calls import TASK_IDS, Value
from deltatune.config import PeftType, config
from deltatune.errors import DataError
from deltatune.methods.common import LayerConfig

EPS = 1e-12  # in the sum that mixing weights are divided by, as PEFT's


@config
class PolyConfig(LayerConfig):
    """Poly's options, with PEFT's names and defaults. Calls take `task_ids`, one per row, when there are several tasks.

    Attributes:
        r: Rank of a skill.
        n_tasks: Number of tasks.
        n_skills: Number of skills, each a pair of factors.
        n_splits: Parts of the input and of the output that are mixed each on its own.
        init_weights: True starts at zero change, False at random.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    r: int = 8
    init_weights: bool = True
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def __post_init__(self) -> None:
        self.peft_type = PeftType.POLY
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            checks.positive_int("PolyConfig", name, getattr(self, name))
        checks.one_of("PolyConfig", "poly_type", self.poly_type, ("poly",))


class Router(nn.Module):
    """Trainable: `module_logits` (tasks, splits x skills)."""

    def __init__(self, tasks: int, splits: int, skills: int) -> None:
        super().__init__()
        self.splits = splits
        self.module_logits = nn.Parameter(torch.empty(tasks, splits * skills).uniform_(-1e-3, 1e-3))

    def forward(self, tasks: Tensor) -> Tensor:
        """How tasks (B,) weigh the skills: (B, splits, skills), each split's summing to one.

        In training they are drawn around that, from a relaxed Bernoulli distribution of temperature one.
        """
        logits = self.module_logits[tasks].unflatten(-1, (self.splits, -1))
        if self.training:
            drawn = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device)
            logits = logits + drawn.logit(eps=torch.finfo(logits.dtype).eps)
        weights = logits.sigmoid()
        return weights / (weights.sum(dim=-1, keepdim=True) + EPS)


class Poly(Adapter):
    """Trainable: skills A (splits, skills, in / splits, r) and B (splits, skills, r, out / splits), and the router."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    reads: tuple[Value, ...] = (TASK_IDS,)
    views: ClassVar[tuple[str, ...]] = (
        *("poly_lora_A", "poly_lora_B", "poly_router", "r", "n_tasks", "n_skills", "n_splits"),
    )

    def __init__(self, layer: LinearMap, r: int, tasks: int, skills: int, splits: int, zero: bool) -> None:
        super().__init__()
        self.r, self.n_tasks, self.n_skills, self.n_splits = r, tasks, skills, splits
        if tasks > 1:
            self.mergeable = "each row has the weight of its task"
        self.poly_lora_A = nn.Parameter(torch.empty(splits, skills, layer.in_features // splits, r))
        self.poly_lora_B = nn.Parameter(torch.zeros(splits, skills, r, layer.out_features // splits))
        self.poly_router = Router(tasks, splits, skills)
        _draw(self.poly_lora_A)
        if not zero:
            _draw(self.poly_lora_B)
            self.identity_at_birth = "init_weights=False draws both factors"

    @classmethod
    def build(cls, layer: LinearMap, config: PolyConfig, path: str) -> Poly:
        common = math.gcd(layer.in_features, layer.out_features)
        sides = f"both sides of {path} ({layer.out_features}, {layer.in_features})"
        checks.divisor("PolyConfig", "n_splits", config.n_splits, common, sides, path)
        return cls(layer, config.r, config.n_tasks, config.n_skills, config.n_splits, config.init_weights)

    def factors(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """A (B, in, r) and B (B, r, out) of tasks (B,)."""
        weights = self.poly_router(tasks)
        A = torch.einsum("bqs,qsdr->bqdr", weights, self.poly_lora_A).flatten(1, 2)
        B = torch.einsum("bqs,qsrd->brqd", weights, self.poly_lora_B).flatten(2, 3)
        return A, B

    def adapt(self, weight: Tensor) -> Tensor:
        if self.n_tasks > 1:
            return super().adapt(weight)
        A, B = self.factors(torch.zeros(1, dtype=torch.long, device=weight.device))
        return weight + (A[0] @ B[0]).T.to(torch.promote_types(weight.dtype, A.dtype)) / self.r

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor] | None:
        if self.n_tasks > 1:
            return None
        A, B = self.factors(torch.zeros(1, dtype=torch.long, device=self.poly_lora_A.device))
        return B[0].T / self.r, A[0].T

    def forward(self, x: Tensor, layer: LinearMap, task_ids: Tensor | None = None, **values: Any) -> Tensor:
        y = layer(x)
        A, B = (factor.to(x.dtype) for factor in self.factors(self._tasks(task_ids, x)))
        if len(A) == 1:
            update = x @ A[0] @ B[0]
        else:
            update = (x.flatten(1, -2) if x.ndim > 2 else x[:, None]) @ A @ B
        return y + (update.reshape(y.shape) / self.r).to(y.dtype)

    def _tasks(self, task_ids: Tensor | None, x: Tensor) -> Tensor:
        """One task per row; a single one for all where the rows need no weights of their own."""
        rows = len(x) if x.ndim > 1 and self.training else 1
        if task_ids is None:
            if self.n_tasks > 1:
                raise DataError(
                    f"the Poly adapter has {self.n_tasks} tasks; pass task_ids, one of 0 to {self.n_tasks - 1} per row",
                    field="task_ids",
                    expected=list(range(self.n_tasks)),
                )
            return torch.zeros(rows, dtype=torch.long, device=x.device)
        ids = task_ids.to(x.device)
        if ids.is_floating_point() or ids.ndim != 1:
            raise DataError(
                f"task_ids of shape {tuple(ids.shape)} and {ids.dtype}; expected one integer per row",
                field="task_ids",
                found=tuple(ids.shape),
                expected="one integer per row",
            )
        if not torch.compiler.is_compiling() and ((ids < 0) | (ids >= self.n_tasks)).any():
            raise DataError(
                f"task_ids holds {sorted({task for task in ids.tolist() if not 0 <= task < self.n_tasks})}; "
                f"the Poly adapter has tasks 0 to {self.n_tasks - 1}",
                field="task_ids",
                found=ids.tolist(),
                expected=list(range(self.n_tasks)),
            )
        return ids.expand(rows).long() if len(ids) == 1 else ids.long()

    def extra_repr(self) -> str:
        return f"r={self.r}, n_tasks={self.n_tasks}, n_skills={self.n_skills}, n_splits={self.n_splits}"


def _draw(factors: Tensor) -> None:
    """Each (in, out) at the end of `factors` as nn.Linear draws its weight (out, in); splits within skills, as PEFT."""
    splits, skills, width, height = factors.shape
    for skill in range(skills):
        for split in range(splits):
            drawn = torch.empty(height, width)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            factors.data[split, skill] = drawn.T


METHOD = Method(PeftType.POLY, PolyConfig, Poly, key_prefix="poly_", default_targets=usual_targets, learning_rate=1e-3)
