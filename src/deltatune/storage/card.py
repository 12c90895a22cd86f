"""The model card that goes with an adapter: the metadata that the ecosystem reads, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from deltatune.config import PeftConfig
from deltatune.notice import warn
from deltatune.storage.files import write_files
from deltatune.storage.locate import is_repository

CARD_NAME = "README.md"
_HEAD = re.compile(r"---[ \t]*\n(.*?)^---[ \t]*(\n|$)", re.DOTALL | re.MULTILINE)
_PLAIN = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)  # needs no quotes in YAML


def model_card(config: PeftConfig, tags: Iterable[str] = ()) -> str:
    method = getattr(config.peft_type, "value", config.peft_type)
    lines = [
        *("---", *_metadata(config, tags).values(), "---", ""),
        *(f"# A {method} adapter", ""),
        "Load it onto the base model it was trained for:",
        "",
        "```python",
        "from deltatune import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, folder)",
        "```",
        "",
    ]
    return "\n".join(lines)


def _metadata(config: PeftConfig, tags: Iterable[str] = ()) -> dict[str, str]:
    """Entry -> its lines."""
    base = config.base_model_name_or_path
    method = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    found = {"library_name": "library_name: peft"}
    own = ["deltatune", method]
    if base and (is_repository(base) or is_repository(f"owner/{base}")):  # a hub name, not a folder of this machine
        found["base_model"] = f"base_model: {_quoted(base)}"
        own.append(f"base_model:adapter:{base}")  # the hub shows it among the adapters of that model
    found["tags"] = "\n".join(["tags:", *(f"- {_quoted(tag)}" for tag in (*own, *tags))])
    return found


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def update_card(folder: Path, config: PeftConfig) -> None:
    """Write a card; of one that is there, the text stays, and its head gets the entries that it lacks.

    Raises:
        SaveError: It cannot be written; what was there is untouched.
    """
    file = folder / CARD_NAME
    if not file.exists():
        write_files(folder, {CARD_NAME: model_card(config).encode()})
        return
    try:
        text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        warn(f"{file}: left as it is, for it cannot be read ({error})")
        return
    head = _HEAD.match(text)
    there = head[1] if head else ""
    present = {line.partition(":")[0] for line in there.splitlines()}
    new = "".join(f"{lines}\n" for name, lines in _metadata(config).items() if name not in present)
    if new:
        rest = text[head.end() :] if head else f"\n{text}"
        write_files(folder, {CARD_NAME: f"---\n{there}{new}---\n{rest}".encode()})
