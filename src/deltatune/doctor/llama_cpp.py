"""llama.cpp, by way of its convert_lora_to_gguf.py: pairs of factors, scaled by lora_alpha / rank."""

from __future__ import annotations

from collections.abc import Iterator

from deltatune.doctor.seen import Seen, some
from deltatune.doctor.verdict import Effect, Finding, Program, changes, only_lora, refuses
from deltatune.doctor.vllm import GIVING_WAY

NORMS = ("_layernorm", ".norm")  # kept by the converter, passed over by the program


def judge(seen: Seen) -> Iterator[Finding]:
    if seen.method != "LORA":
        yield from only_lora(seen, "llama.cpp")
        return
    strange = [name for name in seen.strange if ".base_layer.weight" not in name]
    wrong = [name for name in strange if not any(part in name for part in NORMS)]
    if wrong:
        yield refuses(
            f"{some(wrong)}: not a lora_A or lora_B tensor", seen.way_out if seen.has("use_dora") else seen.merged
        )
    passed = [name for name in strange if name not in wrong]
    if passed:
        yield changes(f"{some(passed)}: trained norms are passed over", seen.merged)
    start = str(seen.values.get("init_lora_weights")).lower()
    if start.startswith(GIVING_WAY):
        yield changes(f"init_lora_weights={start!r}: the base is left as it is", seen.as_lora)
    alpha = seen.values.get("lora_alpha") or 8
    off = seen.otherwise(lambda layer, rank: alpha / rank)
    if off:
        reason = "use_rslora" if seen.has("use_rslora") else "alpha_pattern"
        yield changes(
            f"{reason}: {some(off)} would be scaled by lora_alpha / rank = {alpha / seen.ranks[off[0]]:g} instead of "
            f"{seen.scaling(off[0]):g}",
            seen.fix("export", "--to gguf"),
        )
    for name in ("use_qalora", "use_bdlora", "layer_replication"):
        if seen.has(name):
            yield changes(f"{name}: passed over", seen.way_out)
    head = [layer for layer in seen.ranks if layer.endswith("lm_head")]
    if head:
        yield Finding(Effect.UNSURE, "lm_head: refused where the base ties it to its input embedding", seen.merged)
    if seen.experts:
        yield Finding(
            Effect.UNSURE,
            f"{some(seen.experts)}: the converter expects one pair of factors for each expert",
            seen.fix("export", "--to gguf"),
        )


PROGRAM = Program("llama.cpp", "(convert_lora_to_gguf.py)", judge)
