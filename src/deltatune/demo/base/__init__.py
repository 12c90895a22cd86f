"""The embedded base model: a small T5 that reads its input. How it was made: docs/base-model.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltatune.errors import FormatError

FOLDER = Path(__file__).parent
NAME = "demo"  # what adapters call it: a folder's path would be true on one machine only
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def load_base(folder: Path = FOLDER) -> tuple[Any, Any]:
    """Model in float32 and tokenizer. The weights are stored in bfloat16, which is no precision to train in.

    Raises:
        FormatError: A file of the model is missing.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FormatError(
            f"the embedded base model lacks {', '.join(missing)}; reinstall deltatune, or run scripts/pretrain_base.py",
            path=str(folder),
            found=missing,
        )
    import torch
    from transformers import AutoTokenizer, T5ForConditionalGeneration
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # half a second of a bar over weights is no news
    try:
        model = T5ForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32)
    finally:
        if shown:
            logging.enable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = NAME
    return model.eval(), tokenizer
