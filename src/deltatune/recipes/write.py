"""A settings file for a task and a method, with comments: the task out of `tasks/`, the method out of its config."""

from __future__ import annotations

import textwrap
from importlib.resources import files
from typing import Any

import yaml

from deltatune.errors import ConfigError
from deltatune.recipes.options import Option, options, summary
from deltatune.suggest import did_you_mean
from deltatune.train.defaults import learning_rate, with_defaults
from deltatune.train.method import normal_method
from deltatune.train.settings import TASKS as NAMES

TASKS = {
    "classification": "a text to one of some classes",
    "token_classification": "words to tags, such as names of persons and places",
    "question_answering": "a question to the place in a text that answers it",
    "seq2seq": "a text to a text, with an encoder-decoder",
    "causal": "a prompt to its answer, or plain text, with a decoder",
    "chat": "conversations, through the tokenizer's chat template",
}
MARK = "# METHOD\n"  # where the method's part goes
SHOWN = 8  # options of a method that are shown with their defaults
WIDTH = 118
IGNORED = "Accepted and"  # how docstrings begin that tell of options without effect
SIMPLE = (bool, int, float, str, type(None))


def recipe(task: str, method: str = "lora") -> str:
    """The file as text. Task and method may go by the other names that `train` knows.

    Raises:
        ConfigError: One of them does not exist.
    """
    plain = NAMES.get(task.lower().replace("-", "_"))
    if plain is None:
        raise ConfigError(
            f"there is no recipe {task!r}{did_you_mean(task, NAMES)}; there are {', '.join(TASKS)}",
            field="task",
            found=task,
            expected=list(TASKS),
        )
    method = normal_method(method)
    text = (files("deltatune.recipes") / "tasks" / f"{plain}.yaml").read_text("utf-8")
    return text.replace(MARK, _method(method))


def _method(method: str) -> str:
    """Its name, its options with the values that training chooses, its further ones as comments, its learning rate."""
    chosen = with_defaults(method, {})
    known = {option.name: option for option in options(method)}
    lines = [*_comment(summary(method)), _line("method", method, "deltatune init --list shows all")]
    lines += [_line(name, value, _short(known[name].told)) for name, value in chosen.items()]
    lines += [_line(option.name, option.default, _short(option.told), mark="# ") for option in _further(method, chosen)]
    lines.append(_line("learning_rate", learning_rate(method, chosen), "try a third of it, and three times as much"))
    return "\n".join(lines) + "\n"


def _further(method: str, chosen: dict[str, object]) -> list[Option]:
    rest = [option for option in options(method) if option.own and option.name not in chosen]
    simple = [option for option in rest if isinstance(option.default, SIMPLE)]
    return [option for option in simple if option.told and not option.told.startswith(IGNORED)][:SHOWN]


def _line(name: str, value: Any, comment: str = "", mark: str = "") -> str:
    written = yaml.safe_dump({name: value}, default_flow_style=False, allow_unicode=True).strip()
    if isinstance(value, float):
        written = f"{name}: {value:g}" if "e" not in f"{value:g}" else f"{name}: {value:.1e}"
    return f"{mark + written:<33} # {comment}" if comment else mark + written


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 2)]


def _short(text: str) -> str:
    """The first sentence, as far as a line has room for it."""
    return textwrap.shorten(text.partition(". ")[0].rstrip(".:"), WIDTH - 36, placeholder=" ...")
