"""PEFT's tables of the layers that a method adapts by default, `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`.

Programs read them, and enter architectures of their own; what they enter counts.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from deltatune.adapter import Method
from deltatune.architectures import model_types
from deltatune.config import PeftType
from deltatune.registry import METHODS


class UsualTargets(MutableMapping):
    """Model type -> layers that a method adapts when its config names none.

    Args:
        field: Of the config, where a method has defaults for several.
    """

    def __init__(self, method: Method, field: str = "target_modules") -> None:
        self.method, self.field = method, field

    def __getitem__(self, model_type: str) -> Any:
        found = self._find(model_type)
        if found is None:
            raise KeyError(model_type)
        return found

    def _find(self, model_type: str) -> Any:
        found = self.method.usual_targets(model_type)
        return found.get(self.field) if isinstance(found, dict) else found

    def __setitem__(self, model_type: str, targets: Any) -> None:
        found = self.method.usual_targets(model_type)
        several = isinstance(found, dict) or self.field != "target_modules"
        before = found if isinstance(found, dict) else {}
        self.method.entered[model_type] = {**before, self.field: targets} if several else targets

    def __delitem__(self, model_type: str) -> None:
        del self.method.entered[model_type]

    def _known(self) -> list[str]:
        names = dict.fromkeys([*model_types(), *self.method.entered])
        return [name for name in names if self._find(name) is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __repr__(self) -> str:
        return repr(dict(self))


_TABLES: dict[str, UsualTargets] = {}
_START, _END = "TRANSFORMERS_MODELS_TO_", "_TARGET_MODULES_MAPPING"


def usual(peft_type: str) -> UsualTargets:
    """The table of one method."""
    return _TABLES.setdefault(peft_type, UsualTargets(METHODS[peft_type]))


def __getattr__(name: str) -> UsualTargets:
    """The table that a PEFT constant stands for: those of a method are called by its name, without underscores."""
    by_name = {key.value.replace("_", ""): key for key in METHODS if isinstance(key, PeftType)}
    method = by_name.get(name.removeprefix(_START).removesuffix(_END).replace("_", ""))
    if not (name.startswith(_START) and name.endswith(_END)) or method is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return usual(method)


TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = UsualTargets(METHODS["IA3"], "feedforward_modules")
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}  # nothing here needs another cache layout
