"""Config fields that most layer methods share: which layers, and which modules are trained whole."""

from __future__ import annotations

from typing import Any, ClassVar

from deltatune.config import PeftConfig, config
from deltatune.patterns import check_patterns


@config
class LayerConfig(PeftConfig):
    """Which layers get an adapter.

    Attributes:
        target_modules: Names (matched as whole path endings), a regular expression for the whole path, "all-linear", or
            None for the architecture's usual layers.
        exclude_modules: Names or a regular expression that win over the targets.
        layers_to_transform: Only these layer numbers; needs a list of names as targets.
        layers_pattern: Name of the module list that is numbered, when it cannot be told from the path.
        modules_to_save: Modules trained whole, as copies that are saved beside the adapter (a classifier's head, say).
    """

    # Fields that PEFT's config of this method lacks: they are resolved into `target_modules` before saving.
    beyond_peer: ClassVar[frozenset[str]] = frozenset()
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")  # those of its fields that go by layer name

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        check_patterns(self)


def all_linear(given: dict[str, Any]) -> dict[str, Any]:
    """`train_options` of methods that do best on every linear layer."""
    return {"target_modules": "all-linear"}
