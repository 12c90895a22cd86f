"""The pages of the documentation: their references to code, links, headings and snippets."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "deltatune"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

_REFERENCE = re.compile(r"`(deltatune(?:\.\w+)*):(\w+(?:\.\w+)*)`(?:\]\(([^)\s]+)\))?")
_LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Reference:
    """A place in the code, written `module:qualname`, and the file that the page links it to, if it does."""

    module: str
    qualname: str
    link: str | None

    @property
    def name(self) -> str:
        return f"{self.module}:{self.qualname}"


@dataclass(frozen=True)
class Snippet:
    """A block of Python, and what it prints, if a block of text follows it."""

    code: str
    line: int
    printed: str | None


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def references(page: Path) -> list[Reference]:
    return [Reference(*found) for found in _REFERENCE.findall(page.read_text("utf-8"))]


def resolve(reference: Reference) -> Any:
    """The thing that is named; ImportError or AttributeError where there is none."""
    found: Any = importlib.import_module(reference.module)
    for part in reference.qualname.split("."):
        found = getattr(found, part) if inspect.ismodule(found) else inspect.getattr_static(found, part)
    return found


def links(page: Path) -> list[str]:
    """Targets of links and pictures outside of code blocks."""
    prose = _FENCE.sub("", page.read_text("utf-8"))
    return [one or other for one, other in _LINK.findall(prose)]


def anchors(page: Path) -> set[str]:
    """The names under which the headings of a page can be linked to, as GitHub makes them, and those it sets itself."""
    prose = _FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return {*made, *re.findall(r'<a id="([\w-]+)">', prose)}


def headings(page: Path) -> list[str]:
    """Marks (`##`, `###`) of the headings of a page, in order."""
    return re.findall(r"^(#+) ", _FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text("utf-8")
    blocks = list(_FENCE.finditer(text))
    found = []
    for block, after in zip(blocks, [*blocks[1:], None]):
        if block[2] != "python":
            continue
        follows = after is not None and after[2] == "text" and not text[block.end() : after.start()].strip()
        line = text.count("\n", 0, block.start(3)) + 1
        found.append(Snippet(block[3], line, after[3] if after is not None and follows else None))
    return found


def run(page: Path) -> list[tuple[Snippet, str]]:
    """Run the snippets of a page one after the other, as one program; what each of them printed."""
    names: dict[str, Any] = {"__name__": "documentation"}
    printed = []
    for snippet in snippets(page):
        padded = "\n" * (snippet.line - 1) + snippet.code  # so that a traceback shows the line of the page
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(padded, str(page), "exec", dont_inherit=True), names)
        printed.append((snippet, out.getvalue()))
    return printed


def program(snippet: Snippet) -> str:
    """The code without its comments."""
    return ast.dump(ast.parse(snippet.code))


def block_after(page: Path, heading: str) -> str:
    """The first fenced block below a heading."""
    text = page.read_text("utf-8")
    found = _FENCE.search(text, text.index(f"\n{heading}\n"))
    assert found is not None, f"{title(page)}: no block below {heading!r}"
    return found[3]
