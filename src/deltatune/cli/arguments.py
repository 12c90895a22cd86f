"""Settings on the command line: `config.yaml --learning_rate 1e-4 --lr=1e-4 lr=1e-4 --flag --no-flag`, `_` or `-`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from deltatune.errors import ConfigError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_PAIR = re.compile(r"[A-Za-z][\w-]*=")
_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)*")
_WORDS = {"true", "false", "yes", "no", "on", "off"}
# may be given several times: names of columns, files
_COLUMNS = {"column", "columns", "column_mapping"}
_FILES = {"train_file", "eval_file", "test_file", "data"}
_FOLDERS = {"resume", "resume_from_checkpoint"}  # true, false, or a folder
# given as one word, meant as a list of names; a pattern (anything else than plain names) stays a string
_LISTS = {"target_modules", "modules_to_save", "exclude_modules", "lora_target_modules", "lora_target"}


@dataclass
class Arguments:
    """A settings file, if one was named, and what stands on top of it."""

    config: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


def parse(words: Sequence[str], flags: Collection[str] = (), files: bool = False) -> Arguments:
    """`flags` are the settings that are true or false: they need no value. With `files`, words alone are data files."""
    result = Arguments()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and len(word) > 2:
            key, equals, text = word[2:].partition("=")
            key = key.replace("-", "_")
            if equals:
                _set(result, key, text)
            elif key.startswith("no_") and key[3:] in flags:
                _set(result, key[3:], "false")
            elif rest and (_is_value(rest[0], key in flags) or (key in _FOLDERS and _is_folder(rest[0]))):
                _set(result, key, rest.pop(0))
            else:
                _set(result, key, "true")
        elif _PAIR.match(word):
            key, _, text = word.partition("=")
            _set(result, key.replace("-", "_"), text)
        elif word.startswith("-") and len(word) > 1:
            raise ConfigError(f"option {word!r} is not known; settings are given as --name value", found=word)
        elif files:
            result.files.append(word)
        elif result.config is None:
            result.config = word
        else:
            raise ConfigError(
                f"argument {word!r} stands alone beside the settings file {result.config!r}; "
                "settings are given as --name value or name=value",
                found=word,
            )
    return result


def value_of(text: str) -> Any:
    """A number, a truth value, a list, a mapping or a string, as YAML reads it (and 1e-4 as a number)."""
    if _NUMBER.fullmatch(text):
        return float(text) if set(text) & set(".eE") else int(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _set(result: Arguments, key: str, text: str) -> None:
    if key in _COLUMNS:
        _map(result, text)
        return
    value = value_of(text)
    if key in _FILES and key in result.settings:
        before = result.settings[key]
        result.settings[key] = [*(before if isinstance(before, list) else [before]), *_listed(value)]
        return
    if key in _LISTS and isinstance(value, str) and value != "all-linear" and _NAMES.fullmatch(value):
        value = value.split(",")
    if key in result.settings and result.settings[key] != value:
        raise ConfigError(
            f"{key} is given twice, as {result.settings[key]!r} and {value!r}; keep one", field=key, found=value
        )
    result.settings[key] = value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _pairs(text: str) -> dict[str, str]:
    parts = [part.partition("=") for part in text.split(",")]
    return {name: old for name, _, old in parts}


def _map(result: Arguments, text: str) -> None:
    """`prompt=question`, or several with commas, or a mapping as YAML writes it."""
    value = value_of(text)
    pairs = value if isinstance(value, dict) else _pairs(text)
    if not all(name and old for name, old in pairs.items()):
        raise ConfigError(
            f"column {text!r} is not allowed, expected NAME=NAME_IN_THE_FILE such as prompt=question",
            field="column_mapping",
            found=text,
        )
    result.settings["column_mapping"] = {**result.settings.get("column_mapping", {}), **pairs}


def _is_folder(word: str) -> bool:
    """Rather than a settings file, another option or a pair."""
    return not word.startswith("-") and "=" not in word and not word.lower().endswith((".yaml", ".yml", ".json"))


def _is_value(word: str, flag: bool) -> bool:
    if flag:
        return word.lower() in _WORDS
    return not word.startswith("-") or word == "-" or bool(_NUMBER.fullmatch(word))
