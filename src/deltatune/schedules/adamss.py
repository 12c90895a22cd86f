"""AdaMSS's allocation: which clusters go on training.   https://openreview.net/forum?id=8ZdWmpYxT0"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from deltatune.notice import warn
from deltatune.schedule import Schedule, Sensitivity, falling

if TYPE_CHECKING:
    from deltatune.methods.adamss import Subspaces


class Allocation(Schedule):
    """ASA: of all clusters of all layers that still train, those that matter most go on."""

    adapters: dict[str, Subspaces]

    def __init__(self, name: str, configs: dict[str, Any], adapters: dict[str, Subspaces]) -> None:
        super().__init__(name, configs, adapters)  # type: ignore[arg-type]
        self.sensitivity = Sensitivity(self.config.asa_importance_beta, self.config.asa_uncertainty_beta)
        target = self.config.asa_target_subspaces
        if target >= self.all and not self.config.inference_mode:
            warn(
                f"AdamssConfig: asa_target_subspaces={target} is not less than the {self.all} subspaces that there "
                "are, so none is ever dropped"
            )

    @property
    def all(self) -> int:
        return sum(adapter.num_subspaces for adapter in self.adapters.values())

    def after_step(self) -> None:
        plan = self.config
        if not plan.init_warmup <= self.step <= plan.final_warmup:
            return
        self.require_gradients()
        self.sensitivity.update(self.parameters())
        if self.step % plan.mask_interval == 0:
            ends = (plan.init_warmup, plan.final_warmup, self.all, plan.asa_target_subspaces)
            self._keep(falling(self.step, *ends, exponent=plan.asa_schedule_exponent))
            self.sensitivity.forget()

    def _keep(self, budget: int) -> None:
        left = [(path, k) for path, a in self.adapters.items() for k in range(a.num_subspaces) if k not in a.dropped]
        scores = [self._score(path, k).item() for path, k in left]
        ranked = sorted(range(len(left)), key=lambda place: -scores[place])
        for place in ranked[budget:]:
            path, k = left[place]
            self.adapters[path].dropped.add(k)
        for adapter in self.adapters.values():
            adapter.requires_grad_(True)

    def _score(self, path: str, k: int) -> Tensor:
        adapter = self.adapters[path]
        factors = {"adamss_A": adapter.adamss_A[k], "adamss_B": adapter.adamss_B[k]}
        means = [self.sensitivity.of(f"{path}.{name}.{k}", factor).mean() for name, factor in factors.items()]
        return means[0] + means[1]

    def state_dict(self) -> dict[str, Any]:
        dropped = {path: sorted(adapter.dropped) for path, adapter in self.adapters.items()}
        return {**super().state_dict(), **self.sensitivity.state_dict(), "dropped": dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sensitivity.load_state_dict(state)
        for path, adapter in self.adapters.items():
            adapter.dropped = set(state["dropped"].get(path, ()))
            adapter.requires_grad_(True)


def allocation(name: str, configs: dict[str, Any], adapters: dict[str, Any]) -> Allocation | None:
    """The schedule of an adapter whose config asks for one."""
    return Allocation(name, configs, adapters) if configs[name].use_asa else None


def run_options(given: dict[str, Any], steps: int) -> dict[str, Any]:
    """Allocation in the first half of a run, in ten parts."""
    if not given.get("use_asa"):
        return {}
    return {"init_warmup": steps // 10, "final_warmup": max(steps // 2, 1), "mask_interval": max(steps // 25, 1)}
