"""One contestant in a process of its own, as its memory is measured: `python -m deltatune.demo.contest SPEC.json`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.demo import grammar
from deltatune.demo.contestants import CONTESTANTS, Contestant, Sizes, settings_of
from deltatune.demo.score import score

OUTCOME = "outcome.json"


def contest(contestant: Contestant, sizes: Sizes, output: Path) -> dict[str, Any]:
    """Train (the base excepted), answer the test set, score the answers, and write it all to `outcome.json`."""
    output.mkdir(parents=True, exist_ok=True)
    train, dev, test = (grammar.rows(part, getattr(sizes, part)) for part in grammar.PARTS)
    if contestant.settings:
        facts, model, tokenizer = _trained(settings_of(contestant, sizes, output), train, dev)
    else:
        facts, model, tokenizer = _untouched(dev)
    started = time.monotonic()
    inputs = [row.input for row in test]
    outputs = answers(model, tokenizer, inputs)
    facts |= {
        "key": contestant.key,
        "title": contestant.title,
        "outputs": outputs,
        "answer_seconds": time.monotonic() - started,
        "test_loss": mean_loss(model, tokenizer, inputs, test),
        "test_loss_swapped": mean_loss(model, tokenizer, grammar.mixed_up(test), test),
        "scores": asdict(score(outputs, test)),
    }
    (output / OUTCOME).write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
    return facts


def answers(model: nn.Module, tokenizer: Any, inputs: Sequence[str]) -> list[str]:
    from deltatune.evaluate import answer

    prompts = [tokenizer(text)["input_ids"] for text in inputs]
    return answer(model, tokenizer, prompts, causal=False, max_new_tokens=96, batch_size=32)


def mean_loss(model: nn.Module, tokenizer: Any, inputs: Sequence[str], rows: Sequence[grammar.Row]) -> float:
    """Loss per token of the rows' entries, given these inputs."""
    import torch

    from deltatune.data.collate import Collator
    from deltatune.data.encode import Features
    from deltatune.evaluate import dataset_loss

    targets = [tokenizer(row.target)["input_ids"] for row in rows]
    features = [Features(tokenizer(text)["input_ids"], ids, len(ids)) for text, ids in zip(inputs, targets)]
    collate = Collator(tokenizer.pad_token_id, "seq2seq")
    batches = (collate(features[start : start + 32]) for start in range(0, len(features), 32))
    return dataset_loss(model, batches, "seq2seq", torch.device("cpu")).mean


def _trained(
    values: dict[str, Any], train: Sequence[grammar.Row], dev: Sequence[grammar.Row]
) -> tuple[dict[str, Any], nn.Module, Any]:
    from rich.console import Console

    from deltatune.cli.progress import ProgressBar
    from deltatune.train import TrainSettings
    from deltatune.train import train as run

    console = Console()
    bar = ProgressBar(console)
    with bar if console.is_terminal else nullcontext():
        result = run(
            TrainSettings(**values),
            callbacks=[bar],
            train_rows=[row.as_dict() for row in train],
            eval_rows=[row.as_dict() for row in dev],
        )
    metrics = result.metrics
    weights = [path for path in result.output_dir.iterdir() if path.name in SAVED]
    facts = {
        "trainable": metrics["trainable_parameters"],
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "bytes": sum(path.stat().st_size for path in weights),
        "steps": result.steps,
        "seconds": metrics["train_seconds"],
        "peak_memory": metrics["peak_memory_bytes"],
        "dev_loss": metrics["after"]["eval"]["loss"],
        "history": result.history,
    }
    return facts, result.model.eval(), result.tokenizer


SAVED = {"adapter_model.safetensors", "adapter_config.json", "model.safetensors", "config.json"}


def _untouched(dev: Sequence[grammar.Row]) -> tuple[dict[str, Any], nn.Module, Any]:
    from deltatune.demo.base import load_base

    model, tokenizer = load_base()
    loss = mean_loss(model, tokenizer, [row.input for row in dev], dev)
    total = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "trainable": 0,
        "parameters": total,
        "bytes": 0,
        "steps": 0,
        "seconds": 0.0,
        "peak_memory": None,
        "dev_loss": loss,
    }
    return {**facts, "history": []}, model, tokenizer


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    known = {contestant.key: contestant for contestant in CONTESTANTS}
    contest(known[spec["key"]], Sizes(**spec["sizes"]), Path(spec["output"]))


if __name__ == "__main__":
    main()
