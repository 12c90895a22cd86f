"""The model card that goes with an adapter: the metadata that the ecosystem reads, and how to load it."""

from __future__ import annotations

from deltatune.config import PeftConfig


def model_card(config: PeftConfig) -> str:
    base = config.base_model_name_or_path
    lines = ["---", "library_name: peft"]
    if base and base.count("/") <= 1 and not base.startswith((".", "/")):  # a hub name, not a folder of this machine
        lines.append(f"base_model: {base}")
    method = getattr(config.peft_type, "value", config.peft_type)
    lines += [
        *("tags:", "- deltatune", f"- {str(method).lower()}", "---", ""),
        *(f"# A {method} adapter", ""),
        "Load it onto the base model it was trained for:",
        "",
        "```python",
        "from deltatune import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, folder)",
        "```",
        "",
    ]
    return "\n".join(lines)
