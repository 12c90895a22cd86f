"""`export_adapter`: an adapter in the form that another program reads, judged by its rules and proven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltatune.doctor import diagnose
from deltatune.errors import ConfigError, MergeError
from deltatune.generate.load import Ready
from deltatune.model import PeftModel
from deltatune.ship.convert import load_adapted, prove
from deltatune.ship.place import carry, new_folder
from deltatune.ship.proof import Proof, Tolerance, compare
from deltatune.ship.record import Record, record
from deltatune.ship.samples import samples
from deltatune.ship.targets import TARGETS, Target
from deltatune.suggest import did_you_mean


class ExportError(MergeError):
    """A program cannot be given this adapter."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: Names of the files in the folder.
        use: How the program is started with it.
    """

    folder: Path
    proof: Proof | None
    files: list[str]
    use: str


def export_adapter(
    adapter: str,
    out: str | Path,
    to: str,
    *,
    model: str | None = None,
    inputs: Sequence[str] = (),
    verify: bool = True,
    tolerance: float | None = None,
) -> Exported:
    """Write an adapter for another program into a new folder.

    What the program would refuse or read otherwise is converted where a weight can hold it: to LoRA of one rank with
    its scaling in B. Then the folder is put before the program's rules (`deltatune doctor`), read back, and asked the
    same as the adapter.

    Args:
        to: One of `deltatune.ship.targets.TARGETS`: peft, vllm, sglang, gguf, ollama.

    Raises:
        ExportError: The program has no way to do what the adapter does.
        ConversionError: No weight can hold the method.
        ProofError: What was written says something else; the folder is removed.
    """
    target = _target(to)
    ready = load_adapted(adapter, model)
    texts = samples(adapter, ready, inputs)
    before = record(ready, texts) if verify else None
    with new_folder(out) as folder:
        target.write(ready, adapter, folder)
        if target.program:
            _judged(folder, target, str(out))
        if target.carries:
            carry(adapter, folder)
            ready.tokenizer.save_pretrained(folder)
        proof = _proven(target, folder, texts, before, tolerance, model, ready, str(out))
        files = sorted(path.name for path in folder.iterdir())
    return Exported(Path(out), proof, files, target.use(str(out), ready))


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ConfigError(
            f"to={name!r}: expected one of {', '.join(TARGETS)}{did_you_mean(name, TARGETS)}",
            field="to",
            found=name,
            expected=list(TARGETS),
        )
    return TARGETS[name]


def _judged(folder: Path, target: Target, out: str) -> None:
    """The rules of the program, on what was written for it."""
    verdict = diagnose(folder, [target.program]).verdicts[target.program]
    if not verdict.loads:
        reasons = "; ".join(finding.what for finding in verdict.findings)
        raise ExportError(
            f"{out}: {verdict.program} {verdict.word}: {reasons}; `deltatune merge` makes a plain model of base and "
            "adapter, which every program reads",
            field="to",
            found=reasons,
        )


def _proven(
    target: Target,
    folder: Path,
    texts: Sequence[str],
    before: Record | None,
    tolerance: float | None,
    model: str | None,
    ready: Ready,
    out: str,
) -> Proof | None:
    allowed = Tolerance() if tolerance is None else Tolerance(tolerance)
    if before is None or target.read_back is None:
        return prove(folder, texts, before, allowed, model, ready, out)
    again = target.read_back(folder, ready)
    assert isinstance(again.model, PeftModel)
    proof = compare(before, record(again, texts, [said.answer for said in before.said]), allowed)
    proof.require(out)
    return proof
