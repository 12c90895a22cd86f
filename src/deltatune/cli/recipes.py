"""`deltatune init` and `config-schema`: a settings file to begin with, and what may stand in one."""

from __future__ import annotations

import json
from pathlib import Path

from deltatune.cli.show import console, table
from deltatune.errors import ConfigError
from deltatune.recipes import TASKS, recipe, settings_schema
from deltatune.recipes.options import summary
from deltatune.storage.files import write_files
from deltatune.train.method import method_names


def init(task: str | None, method: str, output: str | None) -> None:
    if task is None:
        _list()
        return
    text = recipe(task, method)
    if output is None:
        print(text, end="")
        return
    path = Path(output)
    if path.exists():
        raise ConfigError(f"{output} is there already; name a new file", field="output", found=output)
    write_files(path.parent, {path.name: text.encode()})
    print(f"written to {output}; look at the data next: deltatune data check --config {output}")


def config_schema(output: str | None) -> None:
    text = json.dumps(settings_schema(), ensure_ascii=False, indent=2) + "\n"
    if output is None:
        print(text, end="")
        return
    path = Path(output)
    write_files(path.parent, {path.name: text.encode()})
    print(f"written to {output}; first line of a settings file: # yaml-language-server: $schema={output}")


def _list() -> None:
    out = console()
    out.print(table(("task", "is"), TASKS.items()))
    out.print()
    out.print(table(("method", "is"), ((name, _equation(name)) for name in method_names())))
    out.print("\nany of the tasks with any of the methods: deltatune init classification --method lora > run.yaml")


def _equation(method: str) -> str:
    """Without the address of the paper."""
    return summary(method).partition("   http")[0]
