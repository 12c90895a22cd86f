"""Options within options: dataclasses that a field of a config holds, as an object or as the dict that files have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from deltatune import checks
from deltatune.errors import ConfigError
from deltatune.suggest import did_you_mean

Kind = TypeVar("Kind", bound="Options")


class Options:
    """Base of such dataclasses."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field; called at construction, and again whenever the config around it is checked."""

    @classmethod
    def of(cls: type[Kind], value: Any, owner: str, name: str) -> Kind | None:
        """The options that a field called `name` holds.

        Raises:
            ConfigError: It is neither such an object nor a dict of its fields.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            checks.refuse(owner, name, value, f"a {cls.__name__}, a dict of its fields, or None")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in value:
            if key not in fields:
                raise ConfigError(
                    f"{owner}: {name} has no {key!r}{did_you_mean(str(key), fields)}",
                    field=name,
                    found=key,
                    expected=sorted(fields),
                )
        made = cls(**{key: given for key, given in value.items() if fields[key].init})
        for key in value:
            setattr(made, key, value[key])
        return made
