"""The order of the training rows: a function of (seed, epoch), so that any position can be found again."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Order:
    """Row numbers by epoch and step. A step takes `micro * accumulation * processes` rows; the last may take fewer."""

    lengths: list[int]
    seed: int
    micro: int  # rows of one forward call
    accumulation: int = 1
    processes: int = 1
    by_length: bool = False

    @property
    def rows_per_step(self) -> int:
        return self.micro * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.rows_per_step)

    def epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.by_length:
            return order
        # rows of like length share a step (less padding); windows of 50 steps keep the order random
        window = 50 * self.rows_per_step
        ordered = [
            row
            for start in range(0, len(order), window)
            for row in sorted(order[start : start + window], key=self.lengths.__getitem__)
        ]
        steps = [ordered[i : i + self.rows_per_step] for i in range(0, len(ordered), self.rows_per_step)]
        whole = len(ordered) // self.rows_per_step  # the short step stays last
        places = [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(steps))]
        return [row for place in places for row in steps[place]]

    def step(self, order: list[int], index: int, process: int = 0) -> list[list[int]]:
        """The micro-batches of one process at step `index` of an epoch; each process has as many of them.

        Those of the last step are empty where the rows have run out.
        """
        rows = order[index * self.rows_per_step : (index + 1) * self.rows_per_step]
        mine = rows[process :: self.processes]
        most = -(-len(rows) // self.processes)  # rows of the first process, which never has fewer than another
        return [mine[i : i + self.micro] for i in range(0, most, self.micro)]


def _mix(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % (2**63)
