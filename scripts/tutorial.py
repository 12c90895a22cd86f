"""Run the commands of docs/tutorial.md, or of another page: fill in what they print, or compare it with what is there.

python scripts/tutorial.py             run all blocks in an empty folder, write their output into the page
python scripts/tutorial.py --check     run them, change nothing; fail where a command or the shape of its output does
python scripts/tutorial.py --check --only 4    the first four blocks
python scripts/tutorial.py --page docs/tutorial-data.md    another page
python scripts/tutorial.py --folder work --first 7    from the seventh block on, where `work` holds what is before

A block of `sh` is one script; `sh fails=3` has to end with that code, and `sh varies` may print any words. The block of
`text` after it is what it printed: all of stdout, and of stderr the lines that are deltatune's own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
COLUMNS = 80
LIMIT_S = 900  # of one block
BLOCK = re.compile(
    r"^```sh(?: fails=(\d+))?( varies)?\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
OWN = ("deltatune:", "warning:", "note:")  # beginnings of our lines on stderr
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?k?|\bnan\b|\binf\b")


@dataclass(frozen=True)
class Block:
    """A script of the page, the code it should end with, and what is said to follow."""

    script: str
    code: int
    printed: str | None
    varies: bool = False


class Broken(Exception):
    """A command of the page does not do what the page says."""


def blocks(text: str) -> list[Block]:
    found = BLOCK.findall(text)
    return [Block(script, int(code or 0), printed or None, bool(varies)) for code, varies, script, printed in found]


def run(block: Block, folder: Path) -> str:
    """What the script prints when it is run in `folder`, without trailing blanks.

    Raises:
        Broken: It ended with another code, or printed a traceback.
    """
    made = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", block.script],
        cwd=folder,
        env=_environment(folder),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if made.returncode != block.code or "Traceback (most recent call last)" in made.stderr:
        raise Broken(f"{block.script}ended with {made.returncode}, not {block.code}:\n{made.stdout}{made.stderr}")
    said = [line for line in made.stderr.splitlines() if line.startswith(OWN)]
    return "".join(f"{line.rstrip()}\n" for line in [*made.stdout.strip("\n").splitlines(), *said])


def _environment(folder: Path) -> dict[str, str]:
    """This interpreter as `python`, this tree as `deltatune`, 80 columns, no network."""
    tools = folder / ".bin"
    if not tools.exists():
        tools.mkdir()
        for name, command in (("python", ""), ("deltatune", "-m deltatune.cli")):
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
            (tools / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": str(COLUMNS),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def shape(printed: str) -> list[str]:
    """The lines without their figures: of a table or a list of facts the first column, of others the first two words.

    Lines that go on from the one above (they are indented) say nothing of their own.
    """
    found = []
    for line in printed.splitlines():
        if not line.strip() or line[0].isspace():
            continue
        label = re.split(r"\s{2,}", line)[0]
        words = NUMBER.sub("0", label).split()
        found.append(" ".join(words[:2]))
    return found


def compare(block: Block, printed: str) -> None:
    """
    Raises:
        Broken: A line of the page has none of its shape in what was printed, or nothing was printed.
    """
    expected = [] if block.varies else shape(block.printed or "")
    missing = [line for line in expected if line not in shape(printed)]
    if missing or not printed.strip():
        raise Broken(f"{block.script}has no line like {missing} in its output now:\n{printed}")


def fill(text: str, number: int, printed: str) -> str:
    """The page with this as the output of its block of that number."""
    found = list(BLOCK.finditer(text))[number]
    fails = f" fails={found[1]}" if found[1] else ""
    made = f"```sh{fails}{found[2] or ''}\n{found[3]}```\n\n```text\n{printed}```\n"
    return text[: found.start()] + made + text[found.end() :]


def go(page: Path, folder: Path, first: int, only: int | None, check: bool) -> None:
    """
    Raises:
        Broken: A block does not do what the page says; those before it are filled in.
    """
    for number, block in list(enumerate(blocks(page.read_text("utf-8"))))[first - 1 : only]:
        printed = run(block, folder)
        if check:
            compare(block, printed)
        else:
            page.write_text(fill(page.read_text("utf-8"), number, printed), "utf-8")
        print(f"ok  {number + 1}  {block.script.splitlines()[0]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", type=int, help="the first so many blocks")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="to work in; else an empty one that is removed")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tutorial-") as place:
        folder = (asked.folder or Path(place)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            go(asked.page, folder, asked.first, asked.only, asked.check)
        except Broken as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
