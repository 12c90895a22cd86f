"""The chat template of a tokenizer: its own, one out of a file, or a named one, only where it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltatune.errors import ConfigError
from deltatune.suggest import did_you_mean

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# for models that were never taught marks of their own: plain words, and the tokenizer's end
PLAIN = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- 'Assistant:' }}"
    "{%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)
NAMED = {"chatml": CHATML, "plain": PLAIN}


def set_template(tokenizer: Any, wanted: str | None) -> None:
    """Give the tokenizer the template that is wanted, which it then saves; refuse where there is none."""
    if wanted is not None:
        tokenizer.chat_template = _template(wanted)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template; choose one with chat_template "
            f"({', '.join(NAMED)}, or a jinja file), or use task: causal",
            field="chat_template",
            expected=[*NAMED, "a file"],
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"task chat needs a fast tokenizer, {type(tokenizer).__name__} is none; save it with a tokenizer.json",
            field="task",
            found=type(tokenizer).__name__,
        )


def _template(wanted: str) -> str:
    if wanted in NAMED:
        return NAMED[wanted]
    path = Path(wanted).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"chat_template={wanted!r} is neither a known name ({', '.join(NAMED)}) nor a file"
            f"{did_you_mean(wanted, NAMED)}",
            field="chat_template",
            found=wanted,
            expected=[*NAMED, "a file"],
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template {wanted} cannot be read: {error}", field="chat_template", path=wanted
        ) from error
