"""What is found about one adapter and one program, and the verdict that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from deltatune.doctor.seen import Seen


class Effect(str, Enum):
    """What a program does with something in a folder."""

    REFUSES = "refuses"  # it stops with an error
    CHANGES = "changes"  # it goes on without a word and computes something else
    NEEDS = "needs"  # it works if it is started so
    UNSURE = "unsure"  # it depends on the base model, which is not looked at


@dataclass(frozen=True)
class Finding:
    """One fact about a folder and a program.

    Attributes:
        what: What stands in the folder, and what the program makes of it.
        fix: A command, or an option of the program, that settles it; empty where there is none.
    """

    effect: Effect
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Verdict:
    """One program's answer; `version` is the release whose source the rules were read from."""

    program: str
    version: str
    findings: tuple[Finding, ...]

    @property
    def loads(self) -> bool:
        """Whether the program computes with the folder what was trained."""
        return not any(finding.effect in (Effect.REFUSES, Effect.CHANGES) for finding in self.findings)

    @property
    def word(self) -> str:
        """The worst of what was found, in a word or two."""
        effects = {finding.effect for finding in self.findings}
        if Effect.REFUSES in effects:
            return "refuses it"
        if Effect.CHANGES in effects:
            return "computes something else"
        return "not certain" if Effect.UNSURE in effects else "loads it"


@dataclass(frozen=True)
class Program:
    """A program that reads adapter folders.

    Attributes:
        title: Its name as it writes it.
        judge: The findings about a folder.
    """

    title: str
    version: str
    judge: Callable[[Seen], Iterable[Finding]]


def refuses(what: str, fix: str = "") -> Finding:
    return Finding(Effect.REFUSES, what, fix)


def changes(what: str, fix: str = "") -> Finding:
    return Finding(Effect.CHANGES, what, fix)


def only_lora(seen: Seen, program: str) -> Iterator[Finding]:
    """For programs that read nothing but LoRA."""
    what = f"{seen.method} is not LoRA, the only method that {program} reads"
    yield refuses(what if seen.mergeable else f"{what}, and no weight can hold it", seen.way_out)
