"""Bytes of tensors: what is there at once, and what waits for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that was allocated at once while `run` ran, beyond what there was before: the profiler's count."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """What `forward` leaves for backward, each storage once; the model's own tensors are there anyway."""
    present = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in present:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own node keeps would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # alive, so that no storage takes the place of another
    del outputs
    return sum(kept.values())
