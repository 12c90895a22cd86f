"""The one place where an exception becomes one line on stderr and an exit code.

0 done, 1 a fault of ours, 2 usage or settings, 3 a file that is missing, broken or does not fit, 4 the machine lacks
something, 5 training failed, 130 and 143 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from deltatune import errors

USAGE, FILE, RESOURCE, TRAINING = 2, 3, 4, 5
CODES: dict[type[errors.PeftError], int] = {
    errors.ConfigError: USAGE,
    errors.TargetError: USAGE,
    errors.AdapterNameError: USAGE,
    errors.StateError: USAGE,
    errors.MergeError: USAGE,
    errors.RequestError: USAGE,
    errors.DataError: FILE,
    errors.FormatError: FILE,
    errors.IntegrityError: FILE,
    errors.MismatchError: FILE,
    errors.UnsafeError: FILE,
    errors.ResumeError: FILE,
    errors.LimitError: RESOURCE,
    errors.SaveError: RESOURCE,
    errors.TrainError: TRAINING,
}
# typer brings click along under changing names; this base of its usage errors is there under all of them
UsageError: Any = typer.BadParameter.__base__


class Verbs(TyperGroup):
    """The group of all verbs; takes `--debug` at any place and turns failures into lines and codes."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        words = [word for word in words if word != "--debug"]
        try:
            code = super().main(words, *rest, standalone_mode=False, **extra)
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            code = tell(error)
        else:
            if code == 130:  # typer has caught a KeyboardInterrupt
                say("interrupted")
        sys.exit(code if isinstance(code, int) else 0)


def tell(error: BaseException) -> int:
    """Say in one line what went wrong; the exit code."""
    code, text = explain(error)
    process = os.environ.get("RANK", "0")  # of several, as launchers number them
    say(text if process == "0" else f"process {process}: {text}")
    return code


def say(text: str) -> None:
    print(f"deltatune: {' '.join(text.split())}", file=sys.stderr, flush=True)


def explain(error: BaseException) -> tuple[int, str]:
    """(exit code, message) of any exception."""
    if isinstance(error, errors.PeftError):
        code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES) if _listed(error) else USAGE
        return code, str(error)
    if isinstance(error, UsageError):
        usage: Any = error
        return USAGE, f"{usage.format_message().rstrip('.?')}; see --help"
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return 130, "interrupted"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("deltatune"):
        return RESOURCE, f"the package {error.name} is not installed; pip install 'deltatune[cli]'"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch is perhaps not imported
        return RESOURCE, f"out of memory: {_first_line(error)}; use smaller batches or a shorter max_length"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        lacking = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS)
        return RESOURCE if lacking else FILE, f"{error.filename}: {error.strerror}"
    from deltatune.train.signals import TrainingInterrupted

    if isinstance(error, TrainingInterrupted):
        return error.exit_code, str(error)
    return 1, f"internal error: {type(error).__name__}: {_first_line(error)}; run again with --debug for the traceback"


def _listed(error: BaseException) -> bool:
    return any(kind in CODES for kind in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
