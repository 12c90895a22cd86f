"""JSON values and bytes, changed at random: a bit too large, of another type, hostile."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# What has broken readers before: sizes, signs, kinds, patterns that backtrack, paths, names of code, templates.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 2**31, 2**63, 2**64, 10**9, 10**30, -(10**9), 0.5, 1.0, -0.1, 1e308,
    1e-300, 2.5, "", "8", "a", "x" * 5000, "nan", "None", "é中\u202e\U0001f600", "\x00", "\n", "\x1b[31m", "\ud800",
    "(a|aa)+$", "(.*)*!", "((a|a)*)*b", ".*" * 30 + "!", "(", "a{100000}", "(?P<n>.)(?P=n)", ".*", "all-linear",
    "q_proj", "lm_head", "model.layers.0", "embed_tokens", "norm", "../../etc/passwd", "/etc/passwd", "C:\\x", "..",
    "os.system", "subprocess", "http://127.0.0.1:9/x", "file:///etc/passwd", "{{ ''.__class__ }}", "LORA", "IA3",
    "PREFIX_TUNING", "NOPE", "CAUSAL_LM", "SEQ_CLS", "pissa", "eva", "gaussian", "lora_only", "all",
    [], {}, [[]], [None], [1, 2], ["q_proj"], ["q_proj", "nope"], [0], [[0, 2]], [[0, 1], [0, 3]], [[0, 99999999]],
    {"q_proj": 2}, {"q_proj": -1}, {"(a|aa)+$": 3}, {".*": 2}, {"a": {"b": [1]}}, {"__class__": "x"}, [["a"] * 3] * 2,
]  # fmt: skip


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a JSON tree, the root included."""
    children: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, child in children for inner in paths_in(child, (*path, key)))]


def mutated(value: Any, draw: random.Random, known: list[str] | None = None) -> tuple[Any, str]:
    """A copy of a JSON tree with one change, and what it was.

    Args:
        known: Keys worth adding at the top.
    """
    value = copy.deepcopy(value)
    path: tuple[Any, ...] = draw.choice(paths_in(value)[1:] or [()])
    if not path or (isinstance(value, dict) and draw.random() < 0.15):
        key = draw.choice([*(known or ()), "surplus", "lora_alhpa", "__init__", "", "a" * 300])
        odd = draw.choice(ODD)
        if isinstance(value, dict):
            value[key] = odd
            return value, f"add {key[:40]!r}: {odd!r:.60}"
        return odd, f"all becomes {odd!r:.60}"
    holder: Any = value
    for key in path[:-1]:
        holder = holder[key]
    last = path[-1]
    kind = draw.choice(["odd", "odd", "odd", "delete", "rename", "near", "wrap"])
    if kind == "delete":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw.choice([str(last)[:-1], str(last).upper(), f"{last} ", "x", str(draw.choice(ODD))])] = holder.pop(
            last
        )
    elif kind == "near" and isinstance(holder[last], (int, float)) and not isinstance(holder[last], bool):
        holder[last] = draw.choice(
            [holder[last] + 1, holder[last] - 1, -holder[last], holder[last] * 2, holder[last] / 3]
        )
    elif kind == "wrap":
        holder[last] = draw.choice([[holder[last]], {"x": holder[last]}, [holder[last]] * 3, str(holder[last])])
    else:
        holder[last] = draw.choice(ODD)
    return value, f"{kind} {'.'.join(map(str, path))[:80]}"


def as_text(value: Any, draw: random.Random) -> tuple[bytes, str]:
    """JSON, now and then not quite."""
    text = json.dumps(value).encode()
    kind = draw.choice(["plain"] * 12 + ["bytes", "twice", "nan", "deep", "bom", "latin", "long", "comment"])
    if kind == "bytes":
        return spoilt(text, draw)
    if kind == "twice" and text.startswith(b"{") and len(text) > 2:
        key = draw.choice([*value, "r"])
        text = b"{" + json.dumps({key: 1})[1:-1].encode() + b", " + text[1:]
    elif kind == "nan":
        text = text.replace(b"null", draw.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"nul"]), 1)
    elif kind == "deep":
        levels = draw.choice([30, 40, 1000, 200_000])
        text = text[:-1] + b', "deep": ' + b"[" * levels + b"]" * draw.choice([levels, levels - 1]) + b"}"
    elif kind == "bom":
        text = b"\xef\xbb\xbf" + text
    elif kind == "latin":
        text = text.replace(b"a", b"\xe4", 2)
    elif kind == "long":
        text = text + b" " * draw.choice([1000, 2_000_000])
    elif kind == "comment":
        text = b"// a comment\n" + text
    return text, kind


def spoilt(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes with one change."""
    kind = draw.choice(["flip", "flip", "cut", "grow", "splice", "zero", "drop", "empty"])
    spot = draw.randrange(len(content)) if content else 0
    if kind == "flip" and content:
        content = content[:spot] + bytes([content[spot] ^ (1 << draw.randrange(8))]) + content[spot + 1 :]
    elif kind == "cut":
        content = content[:spot]
    elif kind == "grow":
        content += draw.randbytes(draw.choice([1, 8, 1000]))
    elif kind == "splice":
        content = content[:spot] + draw.randbytes(draw.randrange(1, 64)) + content[spot:]
    elif kind == "zero":
        content = content[:spot] + bytes(min(64, len(content) - spot)) + content[spot + 64 :]
    elif kind == "drop":
        content = content[:spot] + content[spot + draw.randrange(1, 64) :]
    elif kind == "empty":
        content = b""
    return content, f"{kind} at {spot}"
