"""The demo run: four contestants, a table, samples, a picture, and an adapter that works in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deltatune.demo import grammar, show
from deltatune.demo.contest import OUTCOME
from deltatune.demo.contestants import CONTESTANTS, FULL_RUN, QUICK_RUN, Contestant, Sizes
from deltatune.errors import ConfigError, TrainError

DEFAULT_OUTPUT = "outputs/demo"
RELOADED = 32  # test records answered again in a new process


@dataclass(frozen=True)
class DemoResult:
    """What a run found. `outcomes` are in the order of the table; `reloaded_equal`: whether the
    saved prefix, in a new process, answers exactly as the model that was trained."""

    output: Path
    outcomes: list[dict[str, Any]]
    picture: Path
    reloaded_equal: bool
    seconds: float


def run_demo(output: Path, *, quick: bool = False, console: Console | None = None) -> DemoResult:
    """Train and compare; everything is written below `output`.

    Args:
        quick: A few steps on a few rows: to see that all parts work, not to learn anything.

    Raises:
        TrainError: A contestant's process failed.
    """
    out = console or Console()
    started = time.monotonic()
    sizes = QUICK_RUN if quick else FULL_RUN
    output.mkdir(parents=True, exist_ok=True)
    test = grammar.rows("test", sizes.test)
    _introduce(out, sizes, test[0])
    outcomes = [_run_contestant(contestant, sizes, output, out) for contestant in CONTESTANTS]
    prefix = next(outcome for outcome in outcomes if outcome["key"] == "prefix")
    again = reloaded_answers(output / "prefix", [row.input for row in test[:RELOADED]], out)
    from deltatune.demo.picture import draw

    picture = draw(outcomes, output / "curves.png")
    result = DemoResult(output, outcomes, picture, again == prefix["outputs"][:RELOADED], time.monotonic() - started)
    (output / "demo.json").write_text(json.dumps(_facts(result), indent=2, ensure_ascii=False), encoding="utf-8")
    _conclude(out, result, test)
    return result


def reloaded_answers(adapter: Path, inputs: Sequence[str], out: Console) -> list[str]:
    """What the saved adapter answers in a new process, which knows nothing but its folder."""
    asked, answered = adapter / "reload-inputs.json", adapter / "reload-outputs.json"
    asked.write_text(json.dumps(list(inputs), ensure_ascii=False), encoding="utf-8")
    _process(["deltatune.demo.reload", str(adapter), str(asked), str(answered)], adapter / "reload.log", out)
    return json.loads(answered.read_text(encoding="utf-8"))


def _run_contestant(contestant: Contestant, sizes: Sizes, output: Path, out: Console) -> dict[str, Any]:
    out.print(f"[bold]{contestant.title}[/bold]")
    folder = output / contestant.key
    folder.mkdir(exist_ok=True)
    spec = folder / "spec.json"
    spec.write_text(
        json.dumps({"key": contestant.key, "sizes": asdict(sizes), "output": str(folder)}), encoding="utf-8"
    )
    _process(["deltatune.demo.contest", str(spec)], folder / "run.log", out)
    return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))


def _process(command: list[str], log: Path, out: Console) -> None:
    """Run a module; on a terminal its progress is seen, elsewhere it goes into a file."""
    whole = [sys.executable, "-m", *command]
    with log.open("w", encoding="utf-8") as file:
        place: Any = None if out.is_terminal and out.file is sys.stdout else file
        done = subprocess.run(whole, stdout=place, stderr=file, check=False)
    if done.returncode < 0 or done.returncode in (130, 143):
        raise KeyboardInterrupt
    if done.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no message"]
        raise TrainError(f"{command[0]} ended with code {done.returncode}: {lines[-1]}; see {log}", path=str(log))


def _introduce(out: Console, sizes: Sizes, row: grammar.Row) -> None:
    out.print(
        f"A beekeeper's records, to be written up in the style of a log. {sizes.train} records to learn from, "
        f"{sizes.batch} in a batch; in the test all names and combinations are new. For example:"
    )
    out.print(f"  [dim]{row.input}[/dim]", soft_wrap=True)
    out.print(f"  {row.target}", soft_wrap=True)
    out.print()


def _conclude(out: Console, result: DemoResult, test: Sequence[grammar.Row]) -> None:
    from deltatune.report.words import duration

    out.print()
    out.print(show.table(result.outcomes))
    out.print()
    show.explain(out)
    show.samples(out, result.outcomes, test, 2)
    out.print()
    verdict = "the same answers" if result.reloaded_equal else "[red]other answers[/red]"
    adapter = result.output / "prefix"
    out.print(f"The prefix, loaded from {adapter} in a new process, gives {verdict}.", soft_wrap=True)
    out.print(f"Curves: {result.picture}", soft_wrap=True)
    out.print(f"Try it: deltatune generate {adapter} --compare '{test[0].input}'", soft_wrap=True)
    out.print(f"All of it took {duration(result.seconds)}.")


def _facts(result: DemoResult) -> dict[str, Any]:
    return {
        "reloaded_equal": result.reloaded_equal,
        "seconds": round(result.seconds, 1),
        "outcomes": [{key: value for key, value in one.items() if key != "outputs"} for one in result.outcomes],
    }


def main(words: Sequence[str]) -> None:
    """`deltatune demo [--quick] [--output FOLDER]`."""
    words, quick, output = list(words), False, DEFAULT_OUTPUT
    while words:
        word = words.pop(0)
        name, _, value = word.partition("=")
        if word == "--quick":
            quick = True
        elif name in ("--output", "--output_dir", "--output-dir", "-o") and (value or words):
            output = value or words.pop(0)
        else:
            raise ConfigError(f"demo does not know {word!r}; expected --quick or --output FOLDER", field=name)
    run_demo(Path(output), quick=quick)
