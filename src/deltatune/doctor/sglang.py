"""SGLang: plain LoRA with one rank and one scaling; what it does not know in a config it passes over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deltatune.doctor.seen import Seen, some
from deltatune.doctor.verdict import Effect, Finding, Program, changes, only_lora, refuses
from deltatune.doctor.vllm import GIVING_WAY

SHORTHANDS = ("all", "all-linear")


def judge(seen: Seen) -> Iterator[Finding]:
    if seen.method != "LORA":
        yield from only_lora(seen, "SGLang")
        return
    if seen.has("use_dora"):
        yield refuses("use_dora: DoRA is not supported", seen.as_lora)
    targets: Any = seen.values.get("target_modules")
    if not targets or (isinstance(targets, str) and targets not in SHORTHANDS):
        yield refuses(f"target_modules={targets!r}: it needs a list of names", seen.fix("export", "--to sglang"))
    if "added_tokens.json" in seen.beside:
        yield refuses("added_tokens.json: adapters that add tokens are not supported", seen.merged)
    yield from _scaling(seen)
    yield from _passed_over(seen)
    yield from _queries(seen)
    if seen.experts:
        yield Finding(
            Effect.UNSURE,
            f"{some(seen.experts)}: experts in one tensor are read in another layout, and not in every release",
            seen.fix("export", "--to sglang"),
        )


def _scaling(seen: Seen) -> Iterator[Finding]:
    r, alpha = seen.values.get("r") or 8, seen.values.get("lora_alpha") or 8
    uneven = [layer for layer, rank in seen.ranks.items() if rank != r]
    if uneven:
        yield changes(
            f"rank_pattern: {some(uneven)} has another rank than r={r}, which all layers are read with",
            seen.fix("export", "--to sglang"),
        )
    wrong = seen.otherwise(lambda layer, rank: alpha / r)
    if wrong and not uneven:
        reason = "use_rslora" if seen.has("use_rslora") else "alpha_pattern"
        yield changes(
            f"{reason}: {some(wrong)} would be scaled by lora_alpha / r = {alpha / r:g} instead of "
            f"{seen.scaling(wrong[0]):g}",
            seen.fix("export", "--to sglang"),
        )


def _passed_over(seen: Seen) -> Iterator[Finding]:
    start = str(seen.values.get("init_lora_weights")).lower()
    if start.startswith(GIVING_WAY):
        yield changes(f"init_lora_weights={start!r}: the base is left as it is", seen.as_lora)
    left = [name for name in seen.strange if not (seen.has("use_dora") and "lora_magnitude_vector" in name)]
    if left:
        yield changes(f"{some(left)}: passed over", seen.merged)
    if seen.has("alora_invocation_tokens"):
        yield changes("alora_invocation_tokens: the adapter would act on all tokens")


def _queries(seen: Seen) -> Iterator[Finding]:
    """It stacks queries, keys and values of a layer, beginning at the queries."""
    parents = {layer.rpartition(".")[0] for layer in seen.ranks if layer.endswith((".q_proj", ".k_proj", ".v_proj"))}
    for parent in sorted(parents):
        has = {name: f"{parent}.{name}" in seen.ranks for name in ("q_proj", "k_proj", "v_proj")}
        if has["q_proj"] and not has["v_proj"]:
            yield refuses(f"{parent}: q_proj without v_proj (KeyError)", seen.fix("export", "--to sglang"))
            return
        if not has["q_proj"]:
            yield changes(
                f"{parent}: k_proj and v_proj without q_proj are passed over", seen.fix("export", "--to sglang")
            )
            return


PROGRAM = Program("SGLang", "0.5.23", judge)
