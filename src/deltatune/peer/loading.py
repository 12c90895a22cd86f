"""What transformers' `model.load_adapter` asks PEFT for: from the keys of an adapter's file to live names."""

from __future__ import annotations

import re
from typing import Any

from deltatune.registry import METHODS


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Renamings for transformers' loader, in order: the wrapper's prefix off, the adapter's name in, the model's own.

    Args:
        weight_conversions: The model's own, for the names of its modules. Those that join several weights into one do
            not apply to adapters and are left out.
        peft_config: Whose method says how the names of tensors begin; of all methods where there is none.
    """
    from transformers.core_model_loading import WeightRenaming

    method = METHODS.get(getattr(peft_config, "peft_type", None))  # type: ignore[arg-type]
    prefixes = {m.key_prefix for m in ([method] if method is not None else METHODS.values())}
    named = "|".join(re.escape(prefix) for prefix in sorted(prefixes))
    return [
        WeightRenaming("base_model.model.", ""),
        WeightRenaming(rf"((?:{named})[^\.]*)", rf"\1.{adapter_name}"),
        *(entry for entry in weight_conversions or () if isinstance(entry, WeightRenaming)),
    ]
