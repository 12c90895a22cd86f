"""What happens to an adapter after every optimizer step, and who notices that it did not.

A method whose adapters change while they train (ranks that are given away, subspaces that are dropped) names a
`Schedule` in `Method.schedule`. One is made per adapter name, over all layers of it. `model.after_step()` runs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter
from deltatune.errors import StateError
from deltatune.notice import warn

HOW = (
    "call model.after_step() after optimizer.step() and before optimizer.zero_grad(), "
    "or give deltatune.AdapterCallback() to transformers' Trainer"
)


class Schedule:
    """Subclasses write `after_step`, and extend `state_dict` and `load_state_dict` by what they keep between steps.

    Attributes:
        name: The adapter's name.
        configs: The model's configs by adapter name. Put a changed copy there; the user's object stays as it was.
        adapters: Path of the layer -> its adapter.
        step: Number of the last optimizer step, the first being 1.
    """

    patience: ClassVar[int] = 3  # steps without `after_step` before a warning

    def __init__(self, name: str, configs: dict[str, Any], adapters: dict[str, Adapter]) -> None:
        self.name, self.configs, self.adapters = name, configs, adapters
        self.step = 0
        self._seen: Tensor | None = None  # some numbers of the adapter, as the last training pass met them
        self._missed = 0  # optimizer steps that changed them, `after_step` never having been called

    @property
    def config(self) -> Any:
        return self.configs[self.name]

    def after_step(self) -> None:
        """Gradients and the updated parameters are there; `self.step` has been counted."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values, for checkpoints of a training run."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])

    # ----------------------------------------------------------------------------------------- called by the model

    def parameters(self) -> dict[str, nn.Parameter]:
        """Path and name -> parameter, of all layers."""
        return {f"{path}.{n}": p for path, adapter in self.adapters.items() for n, p in adapter.named_parameters()}

    @property
    def trains(self) -> bool:
        return any(p.requires_grad for adapter in self.adapters.values() for p in adapter.parameters())

    def advance(self, step: int | None = None) -> None:
        """One optimizer step has been made, the next one or the given one."""
        self.step = self.step + 1 if step is None else step
        with torch.no_grad():
            self.after_step()

    def forward_begins(self) -> None:
        """A training pass begins: do the parameters change from pass to pass, and nobody has called `after_step`?"""
        if self.step or self._missed == self.patience or torch.compiler.is_compiling():
            return
        before, self._seen = self._seen, self._some_numbers()
        if before is None or self._seen is None or torch.equal(before, self._seen):
            return
        self._missed += 1
        if self._missed == self.patience:
            method = str(getattr(self.config.peft_type, "value", self.config.peft_type))
            warn(
                f"adapter {self.name!r} ({method}) follows a schedule, and after {self.patience} optimizer steps "
                f"nobody has called it: {HOW}"
            )

    def require_gradients(self) -> None:
        """For schedules that read gradients.

        Raises:
            StateError: There are none, so that `after_step` was called in the wrong place.
        """
        if all(parameter.grad is None for parameter in self.parameters().values()):
            raise StateError(f"adapter {self.name!r}: after_step() finds no gradients; {HOW}", field="after_step")

    def _some_numbers(self) -> Tensor | None:
        """A few of each parameter of one layer. (What counts changes in torch, `_version`, misses fused optimizers.)"""
        adapter = next(iter(self.adapters.values()), None)
        parts = [] if adapter is None else [p.detach() for p in adapter.parameters() if p.requires_grad]
        local = [getattr(part, "_local_tensor", part).flatten()[:4] for part in parts]  # shards under FSDP
        return torch.cat(local) if local else None


class Sensitivity:
    """Smoothed |w dL/dw| of every number and how much it varies; their product is its importance.

    Equations (8) to (10) of AdaLoRA, https://arxiv.org/abs/2303.10512.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is None:  # its layer took no part in this step
                continue
            now = (parameter * parameter.grad).abs().detach()
            if name not in self.mean:
                self.mean[name], self.spread[name] = torch.zeros_like(now), torch.zeros_like(now)
            mean, spread = self.mean[name].to(now.device), self.spread[name].to(now.device)  # a checkpoint's are not
            self.mean[name] = self.beta1 * mean + (1 - self.beta1) * now
            self.spread[name] = self.beta2 * spread + (1 - self.beta2) * (now - self.mean[name]).abs()

    def of(self, name: str, like: Tensor) -> Tensor:
        """The importance of each number of a parameter; zero where no gradient ever came."""
        return self.mean[name] * self.spread[name] if name in self.mean else torch.zeros_like(like)

    def forget(self, names: Iterable[str] | None = None) -> None:
        for name in list(self.mean) if names is None else names:
            self.mean.pop(name, None)
            self.spread.pop(name, None)

    def state_dict(self) -> dict[str, Tensor]:
        means = {f"mean/{name}": tensor for name, tensor in self.mean.items()}
        return {**means, **{f"spread/{name}": tensor for name, tensor in self.spread.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = {key[5:]: value.clone() for key, value in state.items() if key.startswith("mean/")}
        self.spread = {key[7:]: value.clone() for key, value in state.items() if key.startswith("spread/")}


def falling(step: int, begin: int, end: int, first: int, last: int, exponent: float = 3.0) -> int:
    """From `first` at step `begin` to `last` at step `end`: AdaLoRA's equation (12), cubic by default."""
    left = min(max(1 - (step - begin) / (end - begin), 0.0), 1.0)
    return int((first - last) * left**exponent + last)


def pack(schedules: dict[str, Schedule]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The states of schedules as tensors (`adapter:key`) and as JSON values (adapter -> key -> value)."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, schedule in schedules.items():
        for key, value in schedule.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"{name}:{key}"] = value.detach().cpu().contiguous()
            else:
                values.setdefault(name, {})[key] = value
    return tensors, values


def unpack(schedules: dict[str, Schedule], tensors: dict[str, Tensor], values: dict[str, dict[str, Any]]) -> None:
    """The reverse of `pack`; adapters that the states do not name keep what they have."""
    for name, schedule in schedules.items():
        if name in values:
            own = {key.partition(":")[2]: tensor for key, tensor in tensors.items() if key.partition(":")[0] == name}
            schedule.load_state_dict({**own, **values[name]})
