"""vLLM: plain LoRA; it checks the config against a list of options, and every tensor's name."""

from __future__ import annotations

from collections.abc import Iterator

from deltatune.doctor.seen import Seen, some
from deltatune.doctor.verdict import Effect, Finding, Program, only_lora, refuses

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be
USUAL_RANK = 16
HEADS = {"classifier", "score"}  # modules trained whole that it reads
PASSED_OVER = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # untrained, saved beside an adapter
GIVING_WAY = ("pissa", "olora", "corda", "loftq")  # PEFT changes the base when it loads these
OPTIONS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in B",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}


def judge(seen: Seen) -> Iterator[Finding]:
    if seen.method != "LORA":
        yield from only_lora(seen, "vLLM")
        return
    refused = False
    for name, words in OPTIONS.items():
        if seen.has(name):
            refused = True
            yield refuses(f"{name}: {words} is not supported", seen.way_out)
    start = str(seen.values.get("init_lora_weights")).lower()
    if start.startswith(GIVING_WAY):
        yield refuses(f"init_lora_weights={start!r}: the base would have to be changed for it", seen.as_lora)
    copies = sorted(set(seen.values.get("modules_to_save") or ()) - HEADS)
    if copies:
        refused = True
        yield refuses(
            f"modules_to_save={copies}: only a head called score or classifier may be trained whole", seen.merged
        )
    wrong = [name for name in seen.strange if not set(name.split(".")) & HEADS and not name.endswith(PASSED_OVER)]
    if wrong and not refused:
        yield refuses(f"{some(wrong)}: no factor of LoRA by its name", seen.merged)
    yield from _rank(seen)
    if seen.experts:
        yield Finding(
            Effect.UNSURE,
            f"{some(seen.experts)}: the factors of all experts in one tensor are read if the base's experts are fused "
            "there as well",
            seen.fix("export", "--to vllm"),
        )


def _rank(seen: Seen) -> Iterator[Finding]:
    highest = seen.highest_rank
    if highest > RANKS[-1]:
        yield refuses(
            f"rank {highest} is above {RANKS[-1]}, the highest it can be set to", f"{seen.as_lora} --rank {RANKS[-1]}"
        )
    elif highest > USUAL_RANK:
        needed = next(rank for rank in RANKS if rank >= highest)
        yield Finding(
            Effect.NEEDS, f"rank {highest} is above its usual limit of {USUAL_RANK}", f"--max-lora-rank {needed}"
        )


PROGRAM = Program("vLLM", "0.33.0", judge)
