"""What the verbs share for the terminal: consoles, small tables, numbers and sizes in words."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltatune.errors import PeftWarning


def console(stderr: bool = False) -> Console:
    """Made per call, so that a redirected stdout is the one that is written to; 80 columns where there is no screen."""
    stream: Any = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False, soft_wrap=False)
    trimmed: Any = Trimmed(stream)
    return Console(file=trimmed, width=80, highlight=False, soft_wrap=False)


class Trimmed:
    """A stream without the blanks that tables put at the ends of lines: nobody wants them in a file."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.held = stream, ""

    def write(self, text: str) -> int:
        *lines, rest = (self.held + text).split("\n")
        kept = rest.rstrip(" ")
        self.held = rest[len(kept) :]
        self.stream.write("\n".join([*(line.rstrip(" ") for line in lines), kept]))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None, numbers: str = "") -> Table:
    """A plain table; `numbers` lists the columns to set flush right, as one character each (`lrr`)."""
    made = Table(title=title, box=None, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if numbers[index : index + 1] == "r" else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))  # never markup: data holds brackets
    return made


def facts(pairs: Iterable[tuple[str, Any]]) -> Table:
    """Name and value, one a line."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, Text(str(value)))
    return made


def warnings_as_lines() -> None:
    """Our own warnings in one line on stderr; those of other libraries only where the user asked for them."""

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, PeftWarning) or sys.warnoptions:
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = show


def quiet_libraries() -> None:
    """Keep transformers' notices and its bars for loading weights off the screen, and what other libraries say of their
    own parts: bitsandbytes of every layer, torchao of kernels it has not been built with."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
