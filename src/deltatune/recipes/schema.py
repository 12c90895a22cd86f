"""The settings of `train` as JSON schema: editors complete a file by it, and mark what does not belong there.

Options of a method stand beside the other settings and are allowed with that method only, which JSON schema says as
"if method is this, then these properties".
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import PydanticUserError, TypeAdapter

from deltatune.recipes.options import Option, options
from deltatune.train.aliases import ALIASES, BITS, TRANSLATED
from deltatune.train.defaults import NICKNAMES
from deltatune.train.foreign import ADAMW, FIXED, WITHOUT_EFFECT
from deltatune.train.method import method_names
from deltatune.train.settings import TASKS, TrainSettings

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def settings_schema() -> dict[str, Any]:
    """The schema as data; other programs' names are in it as well."""
    made = TrainSettings.model_json_schema()
    own = made.pop("properties")
    del made["additionalProperties"]  # knows nothing of the methods' options; `unevaluatedProperties` does
    nicknames = [name for name, method in NICKNAMES.items() if method in method_names()]
    own["method"]["enum"] = [*method_names(), *nicknames]
    own["task"]["enum"] = list(TASKS)
    own["column_mapping"] = {**own["column_mapping"], **_either(own["column_mapping"], {"type": "string"})}
    own["report_to"] = {**own["report_to"], **_either(own["report_to"], {"type": "string"})}
    own["optimizer"] = {**own["optimizer"], "enum": [*own["optimizer"]["enum"], *ADAMW]}
    for name, aliases in ALIASES.items():
        if name in own:
            own |= {alias: _same_as(name) for alias in aliases if alias not in own}
    own |= {name: {"type": ["boolean", "string"]} for name in TRANSLATED if name not in own}
    own |= {name: {"type": ["integer", "string", "null"]} for name in BITS}
    own |= {name: {} for name in (*WITHOUT_EFFECT, "datasets")}
    own |= {name: {"const": value} for name, (value, _) in FIXED.items()}
    return {
        "$schema": DRAFT,
        **made,
        "title": "Settings of deltatune train",
        "properties": own,
        "allOf": [_with_method(method) for method in method_names()],
        "unevaluatedProperties": False,
    }


def _with_method(method: str) -> dict[str, Any]:
    names = [method, *(name for name, meant in NICKNAMES.items() if meant == method)]
    fields = {option.name: _of_option(option) for option in options(method)}
    fields |= {alias: {} for name, aliases in ALIASES.items() if name in fields for alias in aliases}
    chosen: dict[str, Any] = {"properties": {"method": {"enum": names}}}
    if method != "lora":  # which it is where none is named
        chosen["required"] = ["method"]
    return {"if": chosen, "then": {"properties": fields}}


def _of_option(option: Option) -> dict[str, Any]:
    try:
        found = TypeAdapter(option.kind).json_schema()
    except (PydanticUserError, TypeError):
        found = {}  # any value: the method's config checks it
    found.pop("$defs", None)
    if "$ref" in json.dumps(found):
        found = {}
    if option.told:
        found["description"] = option.told
    try:
        json.dumps(option.default)
    except TypeError:
        return found
    return {**found, "default": option.default}


def _same_as(name: str) -> dict[str, Any]:
    return {"$ref": f"#/properties/{name}", "description": f"another name of {name}"}


def _either(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    kind = {key: first.pop(key) for key in ("type", "items", "additionalProperties") if key in first}
    return {"anyOf": [kind, second]}
