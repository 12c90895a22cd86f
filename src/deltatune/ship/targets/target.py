"""What an export is to know of a form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltatune.generate.load import Ready


@dataclass(frozen=True)
class Target:
    """One form.

    Attributes:
        write: Fill a folder: model and tokenizer, the adapter's folder, the new one.
        use: How the program is started: the new folder, model and tokenizer -> a command.
        program: The rules that the folder has to pass (`deltatune.doctor.judge.PROGRAMS`); empty where it holds another
            format.
        carries: Whether tokenizer and settings of the training go beside it.
        read_back: The written folder as an adapted model; None where the folder is an adapter's.
    """

    write: Callable[[Ready, str, Path], None]
    use: Callable[[str, Ready], str]
    program: str = ""
    carries: bool = True
    read_back: Callable[[Path, Ready], Ready] | None = None
