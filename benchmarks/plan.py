"""What `deltatune plan` reckons for a training job, beside what the job takes: bytes, resident memory, time.

    python benchmarks/plan.py                         all jobs, and the table of docs/plan.md
    python benchmarks/plan.py --only "llama, LoRA" --no-write

Each job runs in a process of its own: it is planned from the config of a random model, then real steps are done on
random tokens. Allocated bytes are the profiler's count of a step beside what the model and the optimizer hold; resident
memory is the process's peak; time is process CPU time of a step with one thread, the median of several.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

DOCUMENT = Path(__file__).parents[1] / "docs" / "plan.md"
RESULTS = Path(__file__).with_suffix(".json")
LONG, SHORT = {"max_length": 256, "max_target_length": 64}, {"max_length": 64, "max_target_length": 32}
CAUSAL = {"model": "llama", "task": "causal"}
SEQ2SEQ = {"model": "t5", "task": "seq2seq"}
CLASSES = {"model": "bert", "task": "classification"}
JOBS: dict[str, dict[str, Any]] = {
    "llama, LoRA": {**CAUSAL, **LONG, "method": "lora"},
    "llama, LoRA, short rows": {**CAUSAL, **SHORT, "method": "lora"},
    "llama, LoRA, checkpointing": {**CAUSAL, **LONG, "method": "lora", "gradient_checkpointing": True},
    "llama, LoRA, whole logits": {**CAUSAL, **LONG, "method": "lora", "loss": "model"},
    "llama, LoRA, bfloat16": {**CAUSAL, **LONG, "method": "lora", "dtype": "bfloat16"},
    "llama, DoRA": {**CAUSAL, **LONG, "method": "lora", "use_dora": True},
    "llama, full": {**CAUSAL, **LONG, "method": "full"},
    "llama, full, checkpointing": {**CAUSAL, **LONG, "method": "full", "gradient_checkpointing": True},
    "llama, prefix": {**CAUSAL, **LONG, "method": "prefix_tuning"},
    "llama, prompt": {**CAUSAL, **SHORT, "method": "prompt_tuning"},
    "t5, LoRA": {**SEQ2SEQ, **LONG, "method": "lora"},
    "t5, prefix": {**SEQ2SEQ, **SHORT, "method": "prefix_tuning"},
    "t5, IA3": {**SEQ2SEQ, **LONG, "method": "ia3"},
    "bert, LoRA": {**CLASSES, **LONG, "method": "lora"},
    "bert, prompt": {**CLASSES, **SHORT, "method": "prompt_tuning"},
    "bert, full, checkpointing": {**CLASSES, **SHORT, "method": "full", "gradient_checkpointing": True},
}
COLUMNS = (
    "job", "tensors reckoned", "measured", "ratio", "resident reckoned", "measured", "step reckoned", "after a probe",
    "measured", "ratio", "with probe",
)  # fmt: skip


def model_of(kind: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any]
    if kind == "llama":
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
        config: Any = transformers.LlamaConfig(
            vocab_size=8192, num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, **sizes
        )
        return transformers.LlamaForCausalLM(config)
    if kind == "t5":
        sizes = {"decoder_start_token_id": 0, "d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 3, "num_heads": 8}
        config = transformers.T5Config(vocab_size=8192, **sizes)
        return transformers.T5ForConditionalGeneration(config)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=8192, num_attention_heads=8, **sizes)
    )


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One job, in this process."""
    import torch
    import transformers
    from harness.memory import peak_bytes

    from deltatune.plan import plan
    from deltatune.plan.job import Shape
    from deltatune.plan.probe import RealSteps
    from deltatune.train import TrainSettings

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given = dict(JOBS[name])
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(given.pop("model"))
        model.save_pretrained(folder)
        settings = TrainSettings(model_name_or_path=folder, per_device_train_batch_size=8, **given)
        cpu = torch.device("cpu")
        made = plan(settings, device="cpu", probing=True)
        assert made.probe is not None
        if settings.dtype == "bfloat16":
            model = model.to(torch.bfloat16)
        real = RealSteps(settings, cpu, Shape.of(settings), model)
        real()
        held = [*real.model.parameters(), *real.model.buffers()]
        held += [v for state in real.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        seconds = real.seconds(rounds)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the profiler, which takes some
        peak = sum(storages.values()) + peak_bytes(real)
    return {
        "peak": [made.memory.peak, peak],
        "resident": [made.resident, resident],
        "seconds": [made.step_seconds / made.probe.slower, made.step_seconds, seconds],
    }


def row(name: str, found: dict[str, Any]) -> list[str]:
    mib, ms = 2**20, 1e-3
    (peak, true), (resident, rss) = found["peak"], found["resident"]
    first, probed, took = found.get("seconds") or (float("nan"),) * 3  # bytes may be kept where times are out of date
    cells = [
        name, f"{peak / mib:,.1f} MiB", f"{true / mib:,.1f} MiB", f"{peak / true:.3f}",
        f"{resident / mib:,.0f} MiB", f"{rss / mib:,.0f} MiB",
        f"{first / ms:.0f} ms", f"{probed / ms:.0f} ms", f"{took / ms:.0f} ms", f"{first / took:.2f}",
        f"{probed / took:.2f}",
    ]  # fmt: skip
    return [cell if "nan" not in cell else "-" for cell in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a job; may be repeated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="leave docs and plan.json as they are")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure(asked.here, asked.rounds)))
        return
    from harness.tables import markdown, put_between

    for name in asked.only or JOBS:
        command = [sys.executable, __file__, "--here", name, "--rounds", str(asked.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        print(" | ".join(row(name, found)), flush=True)
        if asked.no_write:
            continue
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # others may run beside this one
        stored[name] = found
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        table = markdown(COLUMNS, [row(name, stored[name]) for name in JOBS if name in stored])
        DOCUMENT.write_text(put_between(DOCUMENT.read_text(), "jobs", table, DOCUMENT.name))


if __name__ == "__main__":
    main()
