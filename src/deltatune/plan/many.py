"""The same job on several devices: what each of them holds, and what they send each other for one step."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.plan.job import Job
from deltatune.plan.step import Memory

PREFETCH = 50_000_000  # entries that ZeRO-3 gathers ahead, by default


@dataclass(frozen=True)
class Spread:
    """
    Attributes:
        way: "DDP", "FSDP2" or "ZeRO-3".
        states: Bytes of parameters, gradients and optimizer states on each device.
        gathered: Of parameters of the others that are there for a while, or of buffers.
        peak: The most on each device.
        sent: By each device in a step.
    """

    way: str
    devices: int
    states: int
    gathered: int
    peak: int
    sent: int


def spread(job: Job, memory: Memory, devices: int, accumulation: int = 1) -> list[Spread]:
    """Per device, with the same rows on each. FSDP2 gathers block by block and one ahead, embeddings and head once;
    frozen parameters are gathered too, forward and backward, in each micro-batch."""
    parameters = memory.frozen + memory.trained
    states = parameters + memory.gradients + memory.optimizer
    # at the peak there are no more gradients than the trace says; what is not a state stays on each device
    own = memory.peak - memory.frozen - memory.trained - memory.optimizer
    share = (devices - 1) / devices
    reduced = int(2 * share * memory.gradients)
    made = [Spread("DDP", devices, states, memory.gradients, memory.peak + memory.gradients, reduced)]
    shards = -(-states // devices)
    whole = -(-(parameters + memory.optimizer) // devices)
    sent = int(share * (2 * parameters * accumulation + memory.gradients))
    width = max(1, parameters // max(1, sum(p.numel() for p in job.model.parameters())))
    ahead = {"FSDP2": job.sizes.rest + 2 * job.sizes.block, "ZeRO-3": job.sizes.block + PREFETCH * width}
    for way, gathered in ahead.items():
        gathered = min(parameters, gathered)
        made.append(Spread(way, devices, shards, gathered, whole + gathered + own, sent))
    return made
