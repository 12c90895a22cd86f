"""`deltatune chat`: lines in, answers out as they are written; lines with a slash are commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from deltatune.chat.session import Session, check_chat
from deltatune.cli.show import quiet_libraries
from deltatune.errors import PeftError
from deltatune.generate.decoding import Decoding
from deltatune.generate.several import BASE
from deltatune.suggest import did_you_mean

COMMANDS = {
    "/adapter": "NAME: this adapter answers from now on; without a name, which there are",
    "/base": "the base answers, without any adapter",
    "/compare": "[TEXT]: what base and all adapters answer to it, or to your last message; not remembered",
    "/reset": "forget what was said",
    "/system": "TEXT: the system message, for models with a chat template; without a text, none",
    "/help": "these commands",
    "/quit": "end; so does the end of the input",
}
ALSO = {"/exit": "/quit", "/q": "/quit", "/adapters": "/adapter", "/clear": "/reset", "/?": "/help"}


def chat(
    adapters: Sequence[str],
    model: str | None,
    separator: str | None,
    template: str | None,
    system: str | None,
    decoding: Decoding,
) -> None:
    from deltatune.generate.several import load_several, plan_several

    plan = plan_several(adapters, model, separator)
    check_chat(plan.task, decoding)
    quiet_libraries()
    Talk(Session(load_several(plan), decoding, template, system)).run()


class Talk:
    """A session at a terminal, or in a pipe: there answers alone go to stdout, one a line, all else to stderr."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.person = sys.stdin.isatty()

    def run(self) -> None:
        if self.person:
            self._greet()
        for line in self._lines():
            text = line.strip()
            if not text:
                continue
            try:
                if text.startswith("/"):
                    if not self._command(text):
                        return
                else:
                    self._answer(self.session.say(text))
            except PeftError as error:  # of this line only; the conversation goes on
                self._tell(f"deltatune: {error}")
            except KeyboardInterrupt:
                self._tell("(stopped)")

    def _lines(self) -> Iterator[str]:
        if not self.person:
            yield from sys.stdin
            return
        import contextlib

        with contextlib.suppress(ImportError):
            import readline as readline  # line editing and history for input()
        while True:
            try:
                yield input(f"\n{self.session.speaker}> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # once clears the line
                print()

    def _command(self, text: str) -> bool:
        """Whether the conversation goes on."""
        word, _, rest = text.partition(" ")
        command, rest, session = ALSO.get(word, word), rest.strip(), self.session
        if command == "/quit":
            return False
        if command == "/help":
            self._tell("\n".join(f"{name} {what}" for name, what in COMMANDS.items()))
        elif command == "/adapter" and not rest:
            names = [*session.several.adapters, BASE]
            self._tell("\n".join(f"{'*' if name == session.speaker else ' '} {name}" for name in names))
        elif command in ("/adapter", "/base"):
            session.switch(rest if command == "/adapter" else BASE)
            self._tell(f"{session.speaker} answers" + ("" if session.remembers else ", each message on its own"))
        elif command == "/compare":
            for name, pieces in session.compare(rest or None):
                print(f"{name}: ", end="", flush=True)
                self._answer(pieces)
        elif command == "/reset":
            session.reset()
            self._tell("forgotten")
        elif command == "/system":
            session.system = rest or None
            without = "" if session.remembers else f"; {session.speaker} is not given it, nor what was said before"
            self._tell(("system message set" if rest else "no system message") + without)
        else:
            self._tell(f"{word} is no command{did_you_mean(word, COMMANDS)}; /help lists them")
        return True

    def _answer(self, pieces: Iterable[str]) -> None:
        """As it is written; in a pipe on one line, so that a program can read answers line by line."""
        started = False
        for piece in pieces:
            shown = piece if self.person else " ".join(piece.split("\n"))
            shown = shown if started else shown.lstrip()
            started = started or bool(shown)
            print(shown, end="", flush=True)
        print(flush=True)

    def _tell(self, text: str) -> None:
        print(text, file=sys.stdout if self.person else sys.stderr, flush=True)

    def _greet(self) -> None:
        names = self.session.several.adapters
        there = f"{', '.join(names)} on one base" if names else "the base alone"
        how = "" if self.session.remembers else "; each message is answered on its own, as in training"
        print(f"{there}{how}. /help lists commands, Ctrl-C stops an answer, /quit ends.")
