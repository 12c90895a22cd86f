"""Ollama: the GGUF adapter and a Modelfile that puts it onto a base.

The prompt's template is the base's own in Ollama. Templates of tokenizers are Jinja and Ollama's are Go's, so none is
translated here; what the tokenizer's looks like stands in the Modelfile as a comment, to be compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltatune.generate.load import Ready
from deltatune.ship.targets import gguf
from deltatune.ship.targets.target import Target
from deltatune.storage.files import write_files

MODELFILE = "Modelfile"


def write(ready: Ready, adapter: str, folder: Path) -> None:
    gguf.write(ready, adapter, folder)
    write_files(folder, {MODELFILE: modelfile(ready).encode()})


def modelfile(ready: Ready) -> str:
    model: Any = ready.model
    tokenizer = ready.tokenizer
    base = model.active_peft_config.base_model_name_or_path or type(model.get_base_model()).__name__
    lines = [
        f"# Base: {base}, as convert_hf_to_gguf.py writes it, or its name in Ollama's library.",
        "FROM ./base.gguf",
        f"ADAPTER ./{gguf.FILE}",
        "PARAMETER temperature 0",
    ]
    lines += [f"PARAMETER stop {json.dumps(token)}" for token in dict.fromkeys([tokenizer.eos_token]) if token]
    if getattr(tokenizer, "chat_template", None):
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": "{{ .Prompt }}"}], tokenize=False, add_generation_prompt=True
        )
        lines += ["# The adapter was trained on prompts like this one; `ollama show --template` has to say the same:"]
        lines += [f"#   {line}" for line in shown.splitlines()]
    else:
        lines += ["# The adapter was trained on plain text, without a chat template.", 'TEMPLATE "{{ .Prompt }}"']
    return "\n".join(lines) + "\n"


def use(out: str, ready: Ready) -> str:
    return f"cp BASE.gguf {out}/base.gguf && ollama create my-model -f {out}/{MODELFILE}"


TARGET = Target(write, use, carries=False, read_back=gguf.read_back)
