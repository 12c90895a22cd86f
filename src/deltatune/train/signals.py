"""SIGINT and SIGTERM ask the loop to stop at the end of the step; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class TrainingInterrupted(Exception):
    """A signal ended the run after a checkpoint was written; `exit_code` is the shell's (130, 143)."""

    def __init__(self, number: int, step: int, checkpoint: Path | None) -> None:
        self.signal, self.step, self.checkpoint = number, step, checkpoint
        kept = f"checkpoint {checkpoint}; continue with resume_from_checkpoint: true" if checkpoint else "no checkpoint"
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; {kept}")

    @property
    def exit_code(self) -> int:
        return 128 + self.signal


class StopSignals:
    """A context in which signals are remembered in `received` instead of ending the process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *failure: object) -> None:
        self._put_back()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._put_back()  # the next one takes its usual course

    def _put_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
