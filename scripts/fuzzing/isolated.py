"""A call in a forked child with limits of time and memory, and what became of it."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

OVERDUE = 30.0  # seconds after which a child that does not even use the processor is killed


@dataclass(frozen=True)
class Limits:
    """`seconds` of the processor's time; `megabytes` beyond what the parent holds."""

    seconds: float
    megabytes: int


@dataclass(frozen=True)
class Outcome:
    """How a call ended: "ok", the class of a deltatune error, or "CRASH ...", "WRONG", "TIME", "HANG", "MEMORY"."""

    kind: str
    text: str
    seconds: float
    kilobytes: int

    @property
    def good(self) -> bool:
        return not self.kind.isupper() and not self.kind.startswith("CRASH")


class WrongError(Exception):
    """The call returned, but what it did is wrong."""


def run(call: Callable[[], None], limits: Limits) -> Outcome:
    """Call it in a child."""
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(call, limits, writing)
    os.close(writing)
    chunks: list[bytes] = []
    while (left := started + OVERDUE - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
        chunk = os.read(reading, 65536)
        if not chunk:
            break
        chunks.append(chunk)
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status, usage = os.wait4(child, 0)
    kind, _, text = b"".join(chunks).decode(errors="replace").partition("\n")
    seconds = usage.ru_utime + usage.ru_stime
    kilobytes = 0
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        kind = {signal.SIGKILL: "HANG", signal.SIGXCPU: "TIME", signal.SIGPROF: "TIME"}.get(
            signal.Signals(number), f"CRASH signal {number}"
        )
    elif text.startswith("rss "):
        first, _, text = text.partition("\n")
        kilobytes = int(first.split()[1])
    if not os.WIFSIGNALED(status) and kilobytes > limits.megabytes * 1024:
        kind = "MEMORY"
    return Outcome(kind or "CRASH without a word", text, seconds, kilobytes)


def _in_child(call: Callable[[], None], limits: Limits, writing: int) -> NoReturn:
    from deltatune.errors import PeftError

    before = _resident()
    room = int(_virtual() + limits.megabytes * 1.5 * (1 << 20))  # address space is always more than what is used
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    try:
        call()
        kind, text = "ok", ""
    except PeftError as error:
        kind, text = type(error).__name__, str(error)
        if "\n" in text:
            kind = "WRONG"
    except WrongError as error:
        kind, text = "WRONG", str(error)
    except BaseException as error:
        kind, text = f"CRASH {type(error).__name__}", traceback.format_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    message = f"{kind}\nrss {max(0, _peak() - before)}\n{text}".encode(errors="replace")
    while message:
        message = message[os.write(writing, message) :]
    os._exit(0)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def _resident() -> int:
    with open("/proc/self/clear_refs", "w") as file:  # the peak begins anew
        file.write("5")
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def _virtual() -> int:
    return _status("VmSize:") * 1024
