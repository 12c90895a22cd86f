"""The import hook: `peft` and what is below it are modules built from `deltatune.peer.table`, no files of PEFT."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from deltatune.config import PEER_VERSION
from deltatune.peer.table import MODULES, home_of

ROOT = "peft"
SEE = "deltatune stands in for PEFT here (deltatune.as_peft); docs/migrate.md lists what is not there"


class StandIn(ModuleType):
    """One module of PEFT. Its names are those of the table, found in deltatune when they are first used."""

    def __getattr__(self, name: str) -> Any:
        path = f"{self.__name__}.{name}"
        if path in MODULES:
            return importlib.import_module(path)
        value = home_of(self.__name__, name)
        if value is None:
            raise AttributeError(f"{path} is not in deltatune: {SEE}", name=name, obj=self)
        vars(self)[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})

    @property
    def __all__(self) -> list[str]:
        """The names that deltatune has, so that `from peft import *` works."""
        return [name for name in MODULES[self.__name__] if home_of(self.__name__, name) is not None]


class StandInLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name, f"{spec.name}, as deltatune has it.")

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__file__"] = str(Path(__file__))
        if module.__name__ == ROOT:
            vars(module)["__version__"] = PEER_VERSION


class StandInFinder(MetaPathFinder):
    """Answers for `peft` before any other finder, to imports, to `find_spec` and to `importlib.metadata`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != ROOT and not fullname.startswith(f"{ROOT}."):
            return None
        if fullname not in MODULES:
            raise ModuleNotFoundError(f"no module named {fullname!r}: {SEE}", name=fullname)
        spec = ModuleSpec(fullname, StandInLoader(), origin=str(Path(__file__)))
        if any(name.startswith(f"{fullname}.") for name in MODULES):
            spec.submodule_search_locations = []
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        if context is None or context.name is None or context.name.lower() == ROOT:
            yield StandInDistribution()


class StandInDistribution(importlib.metadata.Distribution):
    """What `importlib.metadata.version("peft")` reads."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {ROOT}\nVersion: {PEER_VERSION}\nSummary: served by deltatune\n",
            "top_level.txt": f"{ROOT}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


FINDER = StandInFinder()


def ours(name: str) -> bool:
    """Whether a loaded module is one of those made here."""
    return isinstance(sys.modules.get(name), StandIn)
