"""AdaLoRA's budget: who loses a rank when.   https://arxiv.org/abs/2303.10512, equations (7) to (12)"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune.notice import warn
from deltatune.schedule import Schedule, Sensitivity, falling

if TYPE_CHECKING:
    from deltatune.methods.adalora import AdaLoRA


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
                f"{path}.lora_E": _within(of_layer(self.before, path), adapter.kept or [])
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


def of_layer(pattern: Mapping[str, list[bool]] | None, path: str) -> list[bool] | None:
    """The entry of a layer, whose key is `path.lora_E`, perhaps with an adapter's name behind it."""
    return next((list(kept) for key, kept in (pattern or {}).items() if key.rpartition(".lora_E")[0] == path), None)


def _within(before: list[bool] | None, now: list[bool]) -> list[bool]:
    """Which of all ranks are left, if `before` says which there were, and `now` which of those are."""
    left = iter(now)
    return now if before is None else [was and next(left) for was in before]


def run_options(given: dict[str, Any], steps: int) -> dict[str, Any]:
    """A tenth of the run to warm up, three tenths with the final ranks, a hundred allocations in between."""
    total = given.get("total_step") or steps
    return {
        "total_step": total,
        "tinit": total // 10,
        "tfinal": 3 * total // 10,
        "deltaT": max(1, total // 160),
    }
