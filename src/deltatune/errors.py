"""Every error deltatune raises on purpose: one class per kind of trouble, one line per message.

Each class also inherits the builtin that programs written for PEFT catch in the same place. The message is complete in
itself (what, where, what was expected, what to do next); the attributes carry the same facts for programs.
"""

from __future__ import annotations

from typing import Any


def _one_line(message: str) -> str:
    """Names out of files may hold line ends and what moves a terminal's cursor."""
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


class PeftError(Exception):
    """Base of all deliberate errors. Attributes that do not apply are None."""

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        path: str | None = None,
        key: str | None = None,
        found: Any = None,
        expected: Any = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(_one_line(message))
        self.field, self.path, self.key = field, path, key
        self.found, self.expected, self.hint = found, expected, hint

    def in_file(self, path: str) -> None:
        """Name the file in which the fault is, where the message does not yet."""
        if path not in str(self):
            self.args = (f"{path}: {self}",)
        self.path = self.path or path


class ConfigError(PeftError, ValueError, TypeError):
    """A config has an unknown field, a wrong type or a value out of range."""


class TargetError(PeftError, ValueError):
    """A target names no layer of the model, or a layer that cannot take the method."""


class NoMatchingPeftModuleError(TargetError):
    """The targets of a config name no layer of the model at all."""


class AdapterNameError(PeftError, ValueError, KeyError):
    """An adapter name that cannot be used, or that is not there."""

    __str__ = Exception.__str__  # KeyError would quote the message


class FormatError(PeftError, ValueError, OSError):
    """A file that is missing or cannot be read as what it should be."""


class IntegrityError(PeftError, ValueError):
    """A file whose content does not agree with its own hashes."""


class MismatchError(PeftError, ValueError, RuntimeError):
    """A file and a model that do not fit: keys, shapes, dtypes or the base."""


class UnsafeError(PeftError, ValueError):
    """Something that would run or overwrite what it must not: pickles, paths, remote code."""


class LimitError(PeftError, ValueError):
    """A size, count or time beyond what is accepted."""


class OutOfMemoryError(LimitError, MemoryError):
    """The memory that a call asks for is not there."""


class SaveError(PeftError, OSError, ValueError):
    """Writing failed; what was there before is untouched."""


class MergeError(PeftError, ValueError):
    """Merging is impossible or would damage the base."""


class ConversionError(MergeError, TypeError):
    """No LoRA adapter can hold what another method does."""


class StateError(PeftError, ValueError, RuntimeError):
    """A call at the wrong moment: merged, already present, nothing trainable."""


class DataError(PeftError, ValueError):
    """A data file that is empty, malformed or lacks a field."""


class TrainError(PeftError, RuntimeError):
    """Training cannot go on."""


class ResumeError(PeftError, ValueError):
    """A checkpoint that cannot be continued from under the present conditions."""


class RequestError(PeftError, ValueError):
    """A request to a running service that cannot be answered."""


class PeftWarning(UserWarning):
    """Something doubtful that was accepted."""
