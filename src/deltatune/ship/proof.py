"""Whether two models say the same: prompts and special tokens exactly, logits and answers within a tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.errors import MergeError
from deltatune.ship.record import Record


class ProofError(MergeError, RuntimeError):
    """What was made does not do what it was made from; nothing was left in place."""


@dataclass(frozen=True)
class Tolerance:
    """What may differ.

    Attributes:
        kl: Largest Kullback-Leibler divergence of the next token's distributions at any position, in nats.
        layer: Share of a layer's output that may differ before the layer is named as the place of a fault.
    """

    kl: float = 1e-5
    layer: float = 1e-3


@dataclass(frozen=True)
class Proof:
    """What was compared, and what was found wrong.

    Attributes:
        kl: The largest divergence over all positions of all samples.
        difference: The largest difference of two logits.
        answers: (equal greedy answers, answers).
        layer: The first layer that puts out something else; None where all is within the tolerance.
        faults: In words; empty where the proof holds.
    """

    samples: int
    positions: int
    kl: float
    difference: float
    answers: tuple[int, int]
    layer: str | None
    faults: tuple[str, ...]
    tolerance: Tolerance

    @property
    def holds(self) -> bool:
        return not self.faults

    def require(self, what: str) -> None:
        """Raise what is wrong.

        Raises:
            ProofError: With all faults.
        """
        if self.faults:
            raise ProofError(
                f"{what} does not do what the adapter does: {'; '.join(self.faults)}. Nothing was written; "
                "--tolerance allows a larger KL divergence, --no-verify goes without the proof",
                found=self.faults,
                expected=f"KL <= {self.tolerance.kl:g}",
            )


def compare(before: Record, after: Record, tolerance: Tolerance) -> Proof:
    """`after` has to have been recorded behind the answers of `before`."""
    faults = [*_tokens(before, after)]
    kl = difference = 0.0
    positions = same = asked = 0
    for one, other in zip(before.said, after.said):
        if one.logits.shape == other.logits.shape:
            positions += len(one.logits)
            kl = max(kl, _kl(one.logits, other.logits))
            difference = max(difference, (one.logits - other.logits).abs().max().item())
        elif one.prompt == other.prompt:
            faults.append(f"logits of shape {tuple(other.logits.shape)} instead of {tuple(one.logits.shape)}")
        if one.answer:
            asked, same = asked + 1, same + (one.answer == other.answer)
    layer = None
    if not kl <= tolerance.kl:  # NaN too
        layer = first_apart(before.trace, after.trace, tolerance.layer)
        where = f", first at {layer}" if layer else ""
        faults.append(
            f"KL divergence {kl:.3g}, allowed {tolerance.kl:g}; logits differ by up to {difference:.3g}{where}"
        )
    elif asked > same and not _near_ties(before, after, difference):
        faults.append(f"{asked - same} of {asked} greedy answers are others")
    return Proof(len(before.said), positions, kl, difference, (same, asked), layer, tuple(faults), tolerance)


def first_apart(before: dict[str, Tensor], after: dict[str, Tensor], share: float) -> str | None:
    """The first layer in the order of the forward pass whose outputs differ by more than `share` of their norm."""
    for path, tensor in before.items():
        other = after.get(path)
        if other is None or other.shape != tensor.shape:
            return path
        if not (tensor - other).norm() <= share * tensor.norm():
            return path
    return None


def _tokens(before: Record, after: Record) -> list[str]:
    faults = [
        f"{name} is {after.special[name]!r} instead of {value!r}"
        if name != "chat_template"
        else "the chat template is another one"
        for name, value in before.special.items()
        if after.special[name] != value
    ]
    for number, (one, other) in enumerate(zip(before.said, after.said)):
        if one.prompt != other.prompt:
            at = next((i for i, pair in enumerate(zip(one.prompt, other.prompt)) if pair[0] != pair[1]), None)
            at = min(len(one.prompt), len(other.prompt)) if at is None else at
            faults.append(f"prompt {number + 1} becomes other tokens, from the {at + 1}. on")
            break
    return faults


def _kl(before: Tensor, after: Tensor) -> float:
    """The largest KL(before || after) over the positions."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).max().item()


def _near_ties(before: Record, after: Record, difference: float) -> bool:
    """Whether every answer leaves the other's at a token that the difference of the logits can decide."""
    for one, other in zip(before.said, after.said):
        if one.answer == other.answer:
            continue
        shared = 0
        while shared < min(len(one.answer), len(other.answer)) and one.answer[shared] == other.answer[shared]:
            shared += 1
        row = one.logits[len(one.logits) - len(one.answer) - 1 + shared]
        best: Any = row.topk(2).values
        if (best[0] - best[1]).item() > 2 * difference:
            return False
    return True
