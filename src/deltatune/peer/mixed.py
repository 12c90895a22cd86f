"""`PeftMixedModel`: PEFT's name for a model with adapters of several methods, which every `PeftModel` can have here."""

from __future__ import annotations

from deltatune.model import PeftModel


class PeftMixedModel(PeftModel):
    """A base model with adapters of any methods, several of them active at once.

    It is a `PeftModel` that reads no task from the config. PEFT's cannot be saved; this one can.
    """
