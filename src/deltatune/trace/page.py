"""A trace as one HTML file that needs nothing else: no script, no network, for light and dark, narrow and wide."""

from __future__ import annotations

import re
from pathlib import Path

from deltatune.trace import words
from deltatune.trace.bars import charts
from deltatune.trace.diagram import ways
from deltatune.trace.groups import groups
from deltatune.trace.report import TraceReport


def as_page(report: TraceReport) -> str:
    """The page's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("deltatune.trace", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shape=words.shape, number=words.number, name=words.name, soft=soft)
    template = environment.get_template("page.html.j2")
    html = template.render(
        report=report, words=words, charts=charts(report), ways=ways(report), groups=groups(report.calls)
    )
    return html.strip() + "\n"


def write_page(report: TraceReport, path: str | Path) -> Path:
    """Write the page, whole or not at all; returns its path."""
    from deltatune.storage.files import write_files

    path = Path(path)
    write_files(path.parent, {path.name: as_page(report).encode()})
    return path


def soft(path: str) -> str:
    """A name, module path or place in the code that may break after its dots and before its humps."""
    from markupsafe import Markup, escape

    broken = re.sub(r"(?<=[._:])(?=\w)|(?<=[a-z])(?=[A-Z])", "\0", path)
    return Markup(str(escape(broken)).replace("\0", "<wbr>"))
