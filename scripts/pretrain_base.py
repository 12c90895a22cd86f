"""Pretrain the embedded base model: copying puzzles until copying emerges, then records, forms and public text.

    python scripts/pretrain_base.py --out build/base --text <folder of .txt, .txt.gz, .txt.xz> --minutes 60

Stop it when you like and run the same line again: it goes on from its last checkpoint. `--export` writes the model.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from pretraining import checkpoint, copying, gate, induction, mixture, optimizer, probe, records, text, tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

COLUMNS = "step minutes tokens stage lr loss copied records_loss records_swapped records_exact"


def build_model(vocabulary: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=192,
        d_kv=32,
        num_heads=6,
        d_ff=768,
        num_layers=4,
        num_decoder_layers=4,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        tie_word_embeddings=True,  # type: ignore[call-arg]
        decoder_start_token_id=0,  # type: ignore[call-arg]
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config)
    induction.set_induction(model)
    return model


def load_tokenizer(out: Path, lines: list[str], size: int) -> Tokenizer:
    path = out / "tokenizer.json"
    if not path.exists():
        rng = random.Random("tokenizer")
        invented = [" | ".join(copying.puzzle(rng)) for _ in range(20_000)]
        trained = tokenizer.train_tokenizer([*lines, *invented], size)
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_tokenizer(trained, out)
    return Tokenizer.from_file(str(path))


def rate(progress: float, step: int, warmup: int) -> float:
    """Warm up, stay, then fall linearly to a hundredth over the second half."""
    return min(1.0, (step + 1) / warmup) * (1.0 if progress < 0.5 else max(0.01, 2 * (1 - progress)))


class Run:
    """The state of a pretraining run: model, optimizers, counters and the log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        lines = text.read_lines(args.text)
        self.passages = text.passages(lines)
        self.tokenizer = load_tokenizer(args.out, lines, args.vocabulary)
        torch.manual_seed(0)
        self.master = build_model(self.tokenizer.get_vocab_size())  # float32: what the optimizers move
        self.optimizers = optimizer.build(self.master, args.lr, args.weight_decay)
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0, "shard": 0, "stage": 0}
        if (args.out / "checkpoint" / "state.json").exists():
            self.state = checkpoint.load(args.out / "checkpoint", self.master, self.optimizers)
        self.model: Any = copy.deepcopy(self.master)
        self.model.to(torch.bfloat16)  # what computes: no casts, half the traffic
        self.copies = probe.held_out(copying.copied_name, 64, "copies")
        self.records = probe.held_out(records.pair, 96, "records")

    @property
    def progress(self) -> float:
        return self.state["seconds"] / (60 * self.args.minutes)

    def train(self) -> None:
        stages = (mixture.FIRST, mixture.SECOND, mixture.MAIN)
        while self.progress < 1:
            seed = f"shard {self.state['shard']}"
            started = time.monotonic()
            shard = mixture.batches(
                self.tokenizer, stages[self.state["stage"]], self.passages, seed, self.args.shard, self.args.tokens
            )
            for batch in shard:
                self.step(batch, started)
                started = time.monotonic()
                if self.progress >= 1:
                    break
            self.state["shard"] += 1
            checkpoint.save(self.args.out / "checkpoint", self.master, self.optimizers, self.state)

    def step(self, batch: dict[str, torch.Tensor], started: float) -> None:
        factor = rate(self.progress, self.state["step"], self.args.warmup)
        for one in self.optimizers:
            for group in one.param_groups:
                group["lr"] = group["peak"] * factor
        loss = self.model(**batch).loss
        loss.backward()
        self.update()
        self.state["step"] += 1
        self.state["tokens"] += int(batch["attention_mask"].sum()) + int((batch["labels"] != -100).sum())
        self.state["seconds"] += time.monotonic() - started
        value = loss.item()
        self.state["loss"] = 0.98 * self.state.get("loss", value) + 0.02 * value
        if self.state["step"] % self.args.probe == 0:
            self.log(factor)

    @torch.no_grad()
    def update(self) -> None:
        """Move the float32 weights by the bfloat16 gradients and copy them back."""
        masters, working = list(self.master.parameters()), list(self.model.parameters())
        for master, parameter in zip(masters, working, strict=True):
            master.grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        for one in self.optimizers:
            one.step()
        for master, parameter in zip(masters, working, strict=True):
            parameter.copy_(master)

    def log(self, factor: float) -> None:
        copied = probe.exact_share(self.model, self.tokenizer, self.copies)
        true, swapped = probe.losses(self.model, self.tokenizer, self.records)
        exact = probe.exact_share(self.model, self.tokenizer, self.records)
        state = self.state
        minutes = round(state["seconds"] / 60, 2)
        row = (state["step"], minutes, state["tokens"], state["stage"], f"{factor:.3f}", f"{state['loss']:.4f}",
               f"{copied:.3f}", f"{true:.4f}", f"{swapped:.4f}", f"{exact:.3f}")  # fmt: skip
        path = self.args.out / "log.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([COLUMNS.split(), row] if new else [row])
        print(dict(zip(COLUMNS.split(), row, strict=True)), flush=True)
        if state["stage"] == 0 and (copied >= 0.5 or self.progress > 0.2):
            state["stage"] = 1
        elif state["stage"] == 1 and (copied >= 0.9 or self.progress > 0.3):
            state["stage"] = 2


def export(run: Run, folder: Path) -> None:
    """Write the model in bfloat16, its tokenizer, and the log beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    run.model.generation_config.max_new_tokens = 96
    run.model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_tokenizer(run.tokenizer, folder)
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    figures = gate.measure(model, AutoTokenizer.from_pretrained(folder))
    (folder / "gate.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print({name: value for name, value in figures.items() if name != "examples"})
    (folder / "log.csv").write_text((run.args.out / "log.csv").read_text(encoding="utf-8"), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: tokenizer, checkpoint, log")
    parser.add_argument("--text", type=Path, required=True, help="folder with .txt, .txt.gz or .txt.xz files")
    parser.add_argument("--minutes", type=float, default=60, help="training time, probes not counted")
    parser.add_argument("--export", type=Path, help="write the model here, measure the gate, and stop")
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=4096, help="ids in a batch, inputs and outputs together")
    parser.add_argument("--shard", type=int, default=8192, help="examples made at a time")
    parser.add_argument("--probe", type=int, default=100, help="steps between probes")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    run = Run(args)
    if args.export:
        export(run, args.export)
    else:
        run.train()


if __name__ == "__main__":
    main()
