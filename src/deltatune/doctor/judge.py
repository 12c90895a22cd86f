"""`diagnose`: an adapter folder in front of every program."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.config import CONFIG_NAME, read_json
from deltatune.doctor import llama_cpp, peft, sglang, vllm
from deltatune.doctor.seen import ON_TOKENS, Seen
from deltatune.doctor.verdict import Program, Verdict, refuses
from deltatune.errors import ConfigError, PeftError
from deltatune.inspect.adapter import AdapterFacts, inspect_adapter
from deltatune.registry import METHODS
from deltatune.storage.locate import place
from deltatune.suggest import did_you_mean

PROGRAMS = {
    "peft": peft.PROGRAM,
    "vllm": vllm.PROGRAM,
    "sglang": sglang.PROGRAM,
    "llama.cpp": llama_cpp.PROGRAM,
}


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a folder itself, and each program's verdict.

    Attributes:
        facts: None where the folder is too broken to be read.
        problems: Faults of the folder; with any of them no program is promised to do right.
    """

    folder: str
    facts: AdapterFacts | None
    problems: tuple[str, ...]
    verdicts: dict[str, Verdict]

    @property
    def healthy(self) -> bool:
        return not self.problems


def diagnose(name_or_path: str | Path, programs: Collection[str] | None = None) -> Diagnosis:
    """Judge an adapter folder (or a hub repository) from its files; no base model, no weights of one.

    Args:
        programs: Names out of `PROGRAMS`; None: all of them.

    Raises:
        ConfigError: There is no such program.
        FormatError: There is no such folder.
    """
    chosen = {name: PROGRAMS[_known(name)] for name in (programs or PROGRAMS)}
    where = place(name_or_path)
    try:
        facts = inspect_adapter(name_or_path)
        file = where.find(CONFIG_NAME)
        assert file is not None  # inspect_adapter has read it
        values = read_json(file)
    except PeftError as error:
        broken = refuses(f"the folder cannot be read: {error}")
        verdicts = {name: Verdict(p.title, p.version, (broken,)) for name, p in chosen.items()}
        return Diagnosis(str(name_or_path), None, (str(error),), verdicts)
    seen = Seen(str(name_or_path), values, facts, _mergeable(facts.method, values), _beside(file))
    verdicts = {name: _verdict(program, seen) for name, program in chosen.items()}
    return Diagnosis(str(name_or_path), facts, tuple(facts.problems), verdicts)


def _mergeable(method: str, values: dict[str, Any]) -> bool:
    adapter = METHODS[method].adapter
    return adapter is not None and adapter.mergeable is True and not any(values.get(name) for name in ON_TOKENS)


def _known(name: str) -> str:
    if name not in PROGRAMS:
        raise ConfigError(
            f"no rules for {name!r}{did_you_mean(name, PROGRAMS)}; there are {', '.join(PROGRAMS)}",
            field="programs",
            found=name,
            expected=list(PROGRAMS),
        )
    return name


def _verdict(program: Program, seen: Seen) -> Verdict:
    return Verdict(program.title, program.version, tuple(program.judge(seen)))


def _beside(config: Path) -> frozenset[str]:
    return frozenset(path.name for path in config.parent.iterdir())
