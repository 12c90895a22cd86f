"""A saved adapter in a new process: `python -m deltatune.demo.reload FOLDER INPUTS.json OUTPUTS.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deltatune.demo.contest import answers


def answer_with(folder: Path, inputs: list[str]) -> list[str]:
    """Nothing but the embedded base and the adapter's folder."""
    from deltatune import PeftModel
    from deltatune.demo.base import load_base

    base, tokenizer = load_base()
    model = PeftModel.from_pretrained(base, str(folder))
    return answers(model.eval(), tokenizer, inputs)


def main() -> None:
    folder, inputs, outputs = (Path(word) for word in sys.argv[1:4])
    made = answer_with(folder, json.loads(inputs.read_text(encoding="utf-8")))
    outputs.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
