"""One line of progress: rewritten in place on a terminal, printed twice a minute into a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from deltatune.train.events import Listener, Progress


class Line(Listener):
    """`[3 of 30] banking77-lora-seed0-...  step 120/400  loss 0.412  1 min 10 s left`."""

    def __init__(self, title: str, every: float = 30.0) -> None:
        self.title, self.every = title, every
        self.terminal = sys.stderr.isatty()
        self.stage, self.total = "", None
        self._shown = 0.0 if self.terminal else time.monotonic()

    def tell(self, text: str, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._shown < (0.2 if self.terminal else self.every):
            return
        self._shown = now
        line = f"{self.title}  {text}"
        print(
            f"\r\033[K{line}" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )

    def close(self, text: str) -> None:
        self.tell(text, force=True)
        if self.terminal:
            print(file=sys.stderr, flush=True)

    def on_notice(self, text: str) -> None:
        self.tell(text, force=True)

    def on_stage(self, name: str, total: int | None = None) -> None:
        self.stage, self.total = name, total

    def on_stage_progress(self, done: int) -> None:
        self.tell(f"{self.stage} {done}" + (f"/{self.total}" if self.total else ""))

    def on_step(self, progress: Progress) -> None:
        left = f"{progress.remaining_seconds / 60:.1f} min left"
        self.tell(f"step {progress.step}/{progress.total_steps}  loss {progress.loss:.3f}  {left}")

    def on_end(self, metrics: dict[str, Any]) -> None:
        self.stage = "done"
