"""Whether a prefix in PEFT's layout computes what PEFT computes: the model itself is asked.

PEFT hands a prefix over as the first P entries of the cache. Where a module computes attention by itself, what that
does to its positions, masks and biases stands in its code only. So a trial run compares the bare model on such a cache
with the model that has the prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deltatune.errors import TargetError
from deltatune.prompts.serve import cache_of

if TYPE_CHECKING:
    from deltatune.prompts.key_values import Prefix


def check_as_peft(prefix: Prefix) -> None:
    """Raises TargetError where the two differ, or where the model takes no such cache."""
    model = prefix.stage.model
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "its decoder's attention is code of its own"
    elif any(site.layout is not None and site.layout.anchored for site in prefix.sites):
        reason = "its bias (ALiBi) counts how far a key is, which PEFT's prefix is P tokens of"
    else:
        try:
            with torch.no_grad():
                cache_of(prefix)
            return
        except TargetError as error:
            reason = str(error).partition(", because ")[2].partition("; serve the")[0]
    raise TargetError(
        f"{type(model).__name__}: PEFT's layout is not available, because {reason}; use layout='native'",
        field="layout",
        found="peft",
        expected="native",
    )
