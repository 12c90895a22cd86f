"""HuggingFace PEFT: it reads every method of its own, in its own layouts."""

from __future__ import annotations

from collections.abc import Iterator

from deltatune.config import PEER_VERSION
from deltatune.doctor.seen import Seen
from deltatune.doctor.verdict import Finding, Program, refuses
from deltatune.peer.methods import PROMPTS, TUNERS

KNOWN = {named.peft_type for named in (*TUNERS, *PROMPTS)}


def judge(seen: Seen) -> Iterator[Finding]:
    if seen.method not in KNOWN:
        yield refuses(f"{seen.method} is none of PEFT's methods", seen.as_lora if seen.mergeable else "")
        return
    if seen.values.get("layout") == "native":
        yield refuses(
            "a prefix of deltatune's own layout has no tensor prompt_embeddings (KeyError)",
            seen.fix("export", "--to peft"),
        )


PROGRAM = Program("PEFT", PEER_VERSION, judge)
