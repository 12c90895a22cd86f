"""Adapters whose experts are apart, as transformers 4 kept them and as vLLM loads them, and what they are here.

Apart, each expert has layers of its own: `experts.3.gate_proj`, `experts.3.up_proj`, `experts.3.down_proj` (or `w1`,
`w3`, `w2`), with 2-D factors of rank r each. Here gate and up are one parameter. Its update of rank 2 r, with
A = [A_gate; A_up] and B = diag(B_gate, B_up), is the same two updates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError, MismatchError

GATE_UP, DOWN = "gate_up_proj", "down_proj"
CONTAINERS = {"block_sparse_moe": "mlp"}  # what transformers 4 called a mixture -> what it is called now
_KEY = re.compile(r"(\d+)\.(\w+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Names:
    """What the three layers of one expert are called."""

    gate: str
    up: str
    down: str


KNOWN = (Names("gate_proj", "up_proj", "down_proj"), Names("w1", "w3", "w2"))


def renamed(keys: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Keys under the names that mixtures have now."""
    named = [old for old in CONTAINERS if any(f".{old}." in key for key in keys)]
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()} if named else ()
    for old in named:
        new = CONTAINERS[old]
        if old not in present and new in present:
            keys = {key.replace(f".{old}.", f".{new}."): tensor for key, tensor in keys.items()}
    return dict(keys)


# -------------------------------------------------------------------------------------------------------------- tensors


def fuse(
    tensors: dict[str, Tensor], experts: int, ranks: dict[str, int], interleaved: bool
) -> dict[str, Tensor] | None:
    """Parameter + "." + factor -> tensor, out of those of single experts below their module; None if there are none.

    Args:
        ranks: Of the parameters that are adapted.
        interleaved: The rows of gate and up alternate in the parameter, else one half follows the other.
    """
    apart: dict[tuple[int, str, str], Tensor] = {}
    for key, tensor in tensors.items():
        if (match := _KEY.fullmatch(key)) is None:
            return None
        apart[int(match[1]), match[2], match[3]] = tensor
    if not apart:
        return None
    used = {name for _, name, _ in apart}
    names = next((names for names in KNOWN if used <= {names.gate, names.up, names.down}), None)
    if names is None or max(expert for expert, _, _ in apart) >= experts:
        raise MismatchError(
            f"experts 0 to {max(expert for expert, _, _ in apart)} with layers {sorted(used)} are in the file; the "
            f"model has {experts} experts with layers like {KNOWN[0]}",
            found=sorted(used),
            expected=experts,
        )
    found: dict[str, Tensor] = {}
    for parameter, parts in {GATE_UP: (names.gate, names.up), DOWN: (names.down,)}.items():
        if not used & set(parts) or parameter not in ranks:
            continue
        pairs = [[_pair(apart, e, part) for part in parts] for e in range(experts)]
        A, B = _joined(pairs, ranks[parameter], interleaved and len(parts) > 1)
        found |= {f"{parameter}.lora_A.weight": A, f"{parameter}.lora_B.weight": B}
    return found


def _pair(apart: dict[tuple[int, str, str], Tensor], expert: int, name: str) -> tuple[Tensor, Tensor]:
    """The factors of one layer of one expert; of rank 0 where the file has none."""
    if (expert, name, "A") in apart:
        return apart[expert, name, "A"], apart[expert, name, "B"]
    A = next(tensor for (_, part, which), tensor in apart.items() if which == "A" and part == name)
    B = next(tensor for (_, part, which), tensor in apart.items() if which == "B" and part == name)
    return A[:0], B[:, :0]


def _joined(pairs: list[list[tuple[Tensor, Tensor]]], rank: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(E, rank, in) and (E, out, rank) as files keep them: (E rank, in) and (out, rank E)."""
    downs, ups = [], []
    for parts in pairs:
        A, B = torch.cat([A for A, _ in parts]), torch.block_diag(*(B for _, B in parts))
        if len(A) > rank:
            raise MismatchError(
                f"the factors of one expert have rank {len(A)} together, the adapter has {rank}",
                found=len(A),
                expected=rank,
            )
        if interleaved:
            B = B.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
        missing = rank - len(A)
        downs.append(torch.cat([A, A.new_zeros(missing, A.shape[1])]))
        ups.append(torch.cat([B, B.new_zeros(len(B), missing)], 1))
    return torch.cat(downs), torch.stack(ups, -1).flatten(1)


def split(parameter: str, adapter: Any, names: Names, interleaved: bool, halved: bool) -> dict[str, Tensor]:
    """The tensors of single experts, below their module, of an adapter of one parameter.

    Args:
        halved: Gate has the first half of the rank to itself, and up the second.
    """
    found: dict[str, Tensor] = {}
    for expert, (A, B) in enumerate(zip(adapter.A, adapter.B)):
        if parameter == DOWN:
            parts = {names.down: (A, B)}
        else:
            gate, up = (B[::2], B[1::2]) if interleaved else B.chunk(2)
            r = len(A) // 2 if halved else 0
            parts = {names.gate: (A[: r or None], gate[:, : r or None]), names.up: (A[r:], up[:, r:])}
        for name, (down, rise) in parts.items():
            found |= {f"{expert}.{name}.lora_A.weight": down, f"{expert}.{name}.lora_B.weight": rise}
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in found.items()}


# --------------------------------------------------------------------------------------------------------------- config


def convert(config: Any, parameters: Mapping[str, nn.Module], matches: Any) -> None:
    """Targets that named the layers of single experts name the parameters that hold them now; in place.

    Args:
        parameters: Paths of the modules that hold experts in `gate_up_proj` and `down_proj`.
        matches: Name -> whether layers of the model, other than experts, are called so.
    """
    if not parameters or not isinstance(config.target_modules, (set, list)):
        return
    wanted = {target.rpartition(".")[2]: target for target in config.target_modules}
    for names in KNOWN:
        fused = {GATE_UP: {names.gate, names.up} & wanted.keys(), DOWN: {names.down} & wanted.keys()}
        if len(fused[GATE_UP]) == 1 or not (fused[GATE_UP] or any(not matches(wanted[name]) for name in fused[DOWN])):
            _refuse_half(fused[GATE_UP], names, wanted, matches)
            continue
        gone = {wanted[name] for hits in fused.values() for name in hits if not matches(wanted[name])}
        config.target_modules = set(config.target_modules) - gone
        also = [parameter for parameter, hits in fused.items() if hits]
        config.target_parameters = sorted({*(config.target_parameters or ()), *(f"experts.{name}" for name in also)})
        if fused[GATE_UP]:
            _double(config, names)


def _refuse_half(hits: set[str], names: Names, wanted: dict[str, str], matches: Any) -> None:
    dead = [name for name in hits if not matches(wanted[name])]
    if dead:
        raise ConfigError(
            f"target_modules: {dead[0]!r} of single experts is half of a parameter now ({GATE_UP}); name both "
            f"{names.gate!r} and {names.up!r}, or target_parameters=['experts.{GATE_UP}']",
            field="target_modules",
            found=dead,
        )


def _double(config: Any, names: Names) -> None:
    """Rank and alpha of the joint parameter: room for both updates, at the scale that each had."""
    from deltatune.patterns import pattern_value

    ranks = {pattern_value(config.rank_pattern, f"experts.0.{name}", config.r) for name in (names.gate, names.up)}
    alphas = {
        pattern_value(config.alpha_pattern, f"experts.0.{name}", config.lora_alpha) for name in (names.gate, names.up)
    }
    if len(ranks) > 1 or len(alphas) > 1:
        raise ConfigError(
            f"rank_pattern, alpha_pattern: {names.gate!r} and {names.up!r} of an expert differ ({sorted(ranks)}, "
            f"{sorted(alphas)}), and they are one parameter now",
            field="rank_pattern",
        )
    rank, alpha = ranks.pop(), alphas.pop()
    joint = rf".*\.{GATE_UP}"
    config.rank_pattern = {**config.rank_pattern, joint: 2 * rank}
    config.alpha_pattern = {**config.alpha_pattern, joint: alpha * (2**0.5 if config.use_rslora else 2)}
