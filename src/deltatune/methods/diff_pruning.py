"""Diff pruning: W' = W + z * w, with gates z that an L0 penalty closes; few stay open.   https://arxiv.org/abs/2012.07463"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.factors import block_diagonal, sparse_linear
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.schedule import Schedule


@config
class DiffPruningConfig(LayerConfig):
    """Diff pruning's options; PEFT has no such method. Defaults are those of the paper and its code.

    Attributes:
        prune_step: The optimizer step after which the largest entries of z * w are chosen, over all layers, and go on
            training alone (section 3.2). `model.after_step()` has to be called after every step.
        density: Share of the entries that are left.
        l0_weight: The penalty is this times the expected number of open gates.
        structured: Beside the gate of each entry, one of each whole matrix (section 3.3).
        init_alpha: Every gate's alpha at the start; at 5 it is open with probability 0.99.
        alpha_speed: How many times faster than w the alphas move under Adam; the authors' rates are 0.1 and 5e-5.
        kept: Layer -> how many entries are left of it, once that is decided.
    """

    prune_step: int | None = None
    density: float = 0.005
    l0_weight: float = 1.25e-7
    structured: bool = True
    init_alpha: float = 5.0
    alpha_speed: float = 1000.0
    kept: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peft_type = PeftType.DIFF_PRUNING
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        if self.prune_step is None:
            checks.refuse("DiffPruningConfig", "prune_step", None, "an optimizer step, two thirds of the training, say")
        checks.positive_int("DiffPruningConfig", "prune_step", self.prune_step)
        checks.finite_positive("DiffPruningConfig", "density", self.density)
        checks.finite_positive("DiffPruningConfig", "alpha_speed", self.alpha_speed)
        if self.density > 1:
            checks.refuse("DiffPruningConfig", "density", self.density, "a share of up to 1")
        if self.l0_weight < 0:
            checks.refuse("DiffPruningConfig", "l0_weight", self.l0_weight, "0 or more")


LOWER, UPPER = -1.5, 1.5  # the interval (l, r) over which the paper stretches a gate before it is cut to [0, 1]


class Delta(Adapter):
    """W' = W + `delta()`, which has the shape (out, in / groups)."""

    def delta(self) -> Tensor:
        raise NotImplementedError

    def adapt(self, weight: Tensor) -> Tensor:
        delta = self.delta()
        whole = block_diagonal(delta, weight.shape[1] // delta.shape[1])
        return weight + whole.to(torch.promote_types(weight.dtype, whole.dtype))


class GatedDelta(Delta):
    """Trainable: w, and alpha for the gate of each of its entries: 2 (out in) numbers, one more if structured.

    Attributes:
        kept: Places of the entries that are left, once that is decided; w holds z * w from then on.
    """

    kept: Tensor | None

    def __init__(self, layer: LinearMap, config: DiffPruningConfig) -> None:
        super().__init__()
        shape = (layer.out_features, layer.in_features // layer.groups)
        self.l0_weight, self.init_alpha, self.speed = config.l0_weight, config.init_alpha, config.alpha_speed
        self.register_buffer("kept", None, persistent=False)
        self.diff_w = nn.Parameter(torch.zeros(shape))
        self.diff_alpha = nn.Parameter(torch.zeros(shape))  # alpha = init_alpha + speed * this
        self.diff_group_alpha = nn.Parameter(torch.zeros(1)) if config.structured else None

    @classmethod
    def build(cls, layer: LinearMap, config: DiffPruningConfig, path: str) -> Delta:
        return SparseDelta(layer, config.kept[path]) if path in config.kept else cls(layer, config)

    @property
    def alphas(self) -> list[Tensor]:
        stored = [self.diff_alpha] + ([] if self.diff_group_alpha is None else [self.diff_group_alpha])
        return [self.init_alpha + self.speed * alpha for alpha in stored]

    def gates(self) -> Tensor:
        """z, equation (4): a sample in training, the gate without noise otherwise."""
        return functools.reduce(torch.mul, [self._gate(alpha) for alpha in self.alphas])

    def _gate(self, alpha: Tensor) -> Tensor:
        if self.training:
            u = torch.rand_like(alpha).clamp(1e-4, 1 - 1e-4)
            alpha = alpha + u.log() - (1 - u).log()
        return (alpha.sigmoid() * (UPPER - LOWER) + LOWER).clamp(0, 1)

    def delta(self) -> Tensor:
        if self.kept is None:
            return self.gates() * self.diff_w
        return _scattered(self.diff_w.flatten()[self.kept], self.kept, self.diff_w.shape)

    def penalty(self) -> Tensor | None:
        """The expected number of open gates, equation (5); with groups an entry counts where both gates are open."""
        if self.kept is not None or not self.l0_weight:
            return None
        opened = functools.reduce(torch.mul, [(alpha - math.log(-LOWER / UPPER)).sigmoid() for alpha in self.alphas])
        return self.l0_weight * opened.sum()

    def keep(self, places: Tensor) -> None:
        """Go on with these entries of z * w alone."""
        training = self.training
        self.diff_w.data.copy_(self.eval().delta().detach())
        self.train(training)
        self.kept = places

    def file_tensors(self) -> dict[str, Tensor]:
        if self.kept is None:
            return super().file_tensors()
        return {"diff_indices": self.kept, "diff_values": self.diff_w.flatten()[self.kept]}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        if self.kept is None:
            super().load_file_tensors(tensors)
        else:
            self.kept = tensors["diff_indices"].to(self.kept)
            self.diff_w.data.view(-1)[self.kept] = tensors["diff_values"].to(self.diff_w)


class SparseDelta(Delta):
    """What is left of it in a file: as many numbers as were kept, and their places."""

    diff_indices: Tensor

    def __init__(self, layer: LinearMap, count: int) -> None:
        super().__init__()
        self.shape, self.vectors_in = (layer.out_features, layer.in_features // layer.groups), layer.kind == "linear"
        self.register_buffer("diff_indices", torch.arange(count))
        self.diff_values = nn.Parameter(torch.zeros(count))

    def delta(self) -> Tensor:
        return _scattered(self.diff_values, self.diff_indices, self.shape)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        if not self.vectors_in:
            return super().forward(x, layer)
        rows, columns = self.diff_indices // self.shape[1], self.diff_indices % self.shape[1]
        return layer(x) + sparse_linear(x, self.diff_values, rows, columns, self.shape[0])

    def file_tensors(self) -> dict[str, Tensor]:
        return {"diff_indices": self.diff_indices, "diff_values": self.diff_values}


def _scattered(values: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.new_zeros(math.prod(shape)).index_put((places,), values).view(shape)


class Pruning(Schedule):
    """After `prune_step` the entries with the largest |z w| of all layers are left, `density` of them."""

    @property
    def gated(self) -> dict[str, GatedDelta]:
        return {path: adapter for path, adapter in self.adapters.items() if isinstance(adapter, GatedDelta)}

    def after_step(self) -> None:
        open_ones = {path: adapter for path, adapter in self.gated.items() if adapter.kept is None}
        if self.step < self.config.prune_step or not open_ones:
            return
        sizes = {}
        for path, adapter in open_ones.items():
            training = adapter.training
            sizes[path] = adapter.eval().delta().abs().flatten().cpu()
            adapter.train(training)
        joined = torch.cat(list(sizes.values()))
        left = torch.zeros_like(joined, dtype=torch.bool)
        left[joined.topk(max(1, round(self.config.density * len(joined)))).indices] = True
        for adapter, part in zip(open_ones.values(), left.split([len(size) for size in sizes.values()])):
            adapter.keep(part.nonzero()[:, 0].to(adapter.diff_w.device))
        self._tell()

    def _tell(self) -> None:
        """The config, and so the file, says how many are left."""
        told = copy.copy(self.config)
        before = {path: count for path, count in self.config.kept.items() if path not in self.gated}
        now = {path: len(adapter.kept) for path, adapter in self.gated.items() if adapter.kept is not None}
        told.kept = {**before, **now}
        self.configs[self.name] = told

    def state_dict(self) -> dict[str, Any]:
        kept = {f"kept/{path}": adapter.kept for path, adapter in self.gated.items() if adapter.kept is not None}
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for path, adapter in self.gated.items():
            places = state.get(f"kept/{path}")
            adapter.kept = None if places is None else places.to(adapter.diff_w.device)
        self._tell()


def _run_options(given: dict[str, Any], steps: int) -> dict[str, Any]:
    return {"prune_step": given.get("prune_step") or max(1, 2 * steps // 3)}


METHOD = Method(
    PeftType.DIFF_PRUNING,
    DiffPruningConfig,
    GatedDelta,
    key_prefix="diff_",
    default_targets=usual_targets,
    learning_rate=1e-4,
    train_options=all_linear,
    run_options=_run_options,
    schedule=Pruning,
)
