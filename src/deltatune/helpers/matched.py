"""Which modules of a model an adapter acts on."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltatune import targets
from deltatune.errors import AdapterNameError
from deltatune.helpers.bare import bare
from deltatune.layer import AdaptedLayer


def inspect_matched_modules(tuner: nn.Module, adapter_name: str = "default") -> dict[str, list[str]]:
    """Paths of the base model, as it was before any adapter, by whether the adapter is on them.

    Args:
        tuner: A `PeftModel`, or its `base_model`.

    Returns:
        {"matched": [...], "unmatched": [...]}, in the order of the model.

    Raises:
        AdapterNameError: The model has no adapter of that name.
    """
    known: dict[str, Any] = tuner.peft_config  # type: ignore[assignment]
    if adapter_name not in known:
        raise AdapterNameError(
            f"inspect_matched_modules: no adapter named {adapter_name!r}; there are {list(known)}",
            field="adapter_name",
            found=adapter_name,
            expected=list(known),
        )
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path, module in targets.walk(bare(tuner)):
        here = isinstance(module, AdaptedLayer) and adapter_name in module.adapters
        found["matched" if here else "unmatched"].append(path)
    return found
