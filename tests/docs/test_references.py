"""What the documentation says is there: functions, files, headings, and what its snippets print."""

import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from deltatune.registry import METHODS
from deltatune.train.defaults import PRESETS
from tests.docs.pages import (
    DOCS,
    PAGES,
    ROOT,
    SOURCE,
    anchors,
    block_after,
    headings,
    links,
    program,
    references,
    resolve,
    run,
    snippets,
    title,
)

ENGLISH, CHINESE = DOCS / "how-prefix-tuning-works.md", DOCS / "how-prefix-tuning-works.zh.md"
ARCHITECTURE = DOCS / "architecture.md"
METHOD_PAGES = sorted(page for page in (DOCS / "methods").glob("*.md") if page.stem != "index")
RUNNING = [ENGLISH, CHINESE, ARCHITECTURE, DOCS / "files.md", DOCS / "combine.md", DOCS / "experts.md", *METHOD_PAGES]

each_page = pytest.mark.parametrize("page", PAGES, ids=title)


@each_page
def test_every_function_a_page_names_is_there(page: Path):
    missing = []
    for reference in references(page):
        try:
            resolve(reference)
        except (ImportError, AttributeError) as error:
            missing.append(f"{reference.name} ({error})")
    assert not missing, f"{title(page)} names what is not there: {missing}"


@each_page
def test_a_function_is_linked_to_the_file_it_is_in(page: Path):
    for reference in references(page):
        if reference.link is not None:
            resolve(reference)
            module = Path(str(sys.modules[reference.module].__file__)).resolve()
            target = (page.parent / reference.link).resolve()
            same = target.parts[-3:] == module.parts[-3:]  # the package may be installed elsewhere
            assert target.is_file() and same, f"{title(page)}: {reference.name} is linked to {reference.link}"


@each_page
def test_links_lead_somewhere(page: Path):
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if (
            not target.exists()
            or not target.is_relative_to(ROOT)
            or (anchor and target.suffix == ".md" and anchor not in anchors(target))
        ):
            broken.append(link)
    assert not broken, f"{title(page)} links to what is not there: {broken}"


@pytest.mark.parametrize("page", RUNNING, ids=title)
def test_snippets_run_and_print_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    before = dict(METHODS.entries)  # a copy of METHODS itself would share them, and be emptied too
    try:
        results = run(page)
    finally:
        METHODS.entries = before
    assert results, f"{title(page)} has no snippet"
    for snippet, printed in results:
        expected = snippet.printed or ""
        assert printed == expected, f"{title(page)}, line {snippet.line}"


def test_both_guides_name_the_same_functions_in_the_same_order():
    assert [found.name for found in references(CHINESE)] == [found.name for found in references(ENGLISH)]


def test_both_guides_have_the_same_steps_and_the_same_code():
    assert headings(CHINESE) == headings(ENGLISH)
    english, chinese = snippets(ENGLISH), snippets(CHINESE)
    assert [program(snippet) for snippet in chinese] == [program(snippet) for snippet in english]
    assert [snippet.printed for snippet in chinese] == [snippet.printed for snippet in english]


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=title)
def test_every_step_of_the_guide_names_a_function(page: Path):
    steps = re.split(r"^## (?=\d)", page.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert len(steps) >= 10
    silent = [step.splitlines()[0] for step in steps if not re.search(r"`deltatune[\w.]*:\w", step)]
    assert not silent, f"{title(page)}: steps without a function: {silent}"


def test_every_method_has_a_page_and_every_page_a_method():
    assert {page.stem for page in METHOD_PAGES} == {*(method.name for method in METHODS.values()), *PRESETS}


@pytest.mark.parametrize("page", METHOD_PAGES, ids=title)
def test_a_method_page_cites_its_paper(page: Path):
    assert re.search(r"https://(arxiv\.org/abs|openreview\.net|doi\.org)/\S+", page.read_text("utf-8"))


def test_the_worked_example_of_a_new_method_is_one_that_is_not_built():
    assert "KRONA" not in METHODS, "docs/architecture.md shows KronA as what is not there: take another"


def mapped() -> dict[str, bool]:
    """Paths of the folder map, below src/deltatune; True for folders."""
    found: dict[str, bool] = {}
    parents: list[str] = []
    for line in block_after(ARCHITECTURE, "## The folders").splitlines()[1:]:  # the first line is the root
        entry = re.match(r"((?:  )+)(\S+)", line)
        if entry is None:
            continue
        depth = len(entry[1]) // 2 - 1
        name = entry[2]
        if depth > len(parents):  # a clause that goes on in the next line
            continue
        parents[depth:] = [name]
        found["".join(parents)] = name.endswith("/")
    return found


def test_the_folder_map_is_the_tree():
    entries = mapped()
    gone = [name for name in entries if not (SOURCE / name).exists()]
    assert not gone, f"docs/architecture.md maps what is not there: {gone}"
    listed = {name.rpartition("/")[0] + "/" for name, is_folder in entries.items() if not is_folder}
    for file in sorted(SOURCE.rglob("*.py*")):
        if file.suffix == ".pyc":
            continue
        name = file.relative_to(SOURCE).as_posix()
        folder = name.rpartition("/")[0] + "/"
        folders = {f"{part}/" for part in _above(name)}
        # A folder line speaks for its files, unless some of them are listed one by one: then all of them are.
        covered = name in entries or (folder not in listed and bool(folders & entries.keys()))
        assert covered, f"docs/architecture.md, 'The folders', lacks {name}"


def _above(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
