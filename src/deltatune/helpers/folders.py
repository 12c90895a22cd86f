"""Whether a folder or a hub repository is an adapter."""

from __future__ import annotations

from deltatune.config import PeftConfig


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether there is an adapter's config that can be read. What cannot be reached counts as none."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever a hub answers: the question is whether it could be loaded
        return False
    return True
