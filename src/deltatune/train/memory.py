"""How much memory the run holds."""

from __future__ import annotations

import psutil
import torch


class MemoryMeter:
    """Now and at most: of the accelerator where the model is on one, of the process otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.process = psutil.Process()
        self.peak = 0
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)

    def measure(self) -> int:
        if self.cuda is not None:
            self.peak = torch.cuda.max_memory_allocated(self.cuda)
            return torch.cuda.memory_allocated(self.cuda)
        now = self.process.memory_info().rss
        self.peak = max(self.peak, now)
        return now
