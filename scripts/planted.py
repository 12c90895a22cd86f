"""The faults that `mutants.py` plants: one line of a method, and the same line with a typical mistake in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In `file` of the package, `right` becomes `wrong`."""

    method: str
    fault: str
    right: str
    wrong: str
    place: str = ""  # if not the method's file

    @property
    def file(self) -> str:
        return self.place or f"methods/{self.method}.py"

    def into(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            LookupError: The line has changed or stands there more than once; the mutant needs another.
        """
        if text.count(self.right) != 1:
            raise LookupError(f"{self.file} holds {self.right!r} {text.count(self.right)} times, not once")
        return text.replace(self.right, self.wrong)


MUTANTS = [
    Mutant("lora", "forgotten scale, forward", "y + (self.scaling * update)", "y + (update)"),
    Mutant(
        "lora",
        "forgotten scale, both ways",
        "return weight + self.scaling * (self.B @ self.A)",
        "self.scaling = 1.0; return weight + self.scaling * (self.B @ self.A)",
    ),
    Mutant("lora", "wrong sign, both ways", "self.lora_B.matrix, self.blocks", "-self.lora_B.matrix, self.blocks"),
    Mutant("lora", "bias forgotten in the weight", "bias + self.scaling * own", "bias"),
    Mutant("lora", "dropout on indices", "x if self.embedding else self.lora_dropout(x)", "self.lora_dropout(x)"),
    Mutant("lora", "rank-stabilised scale", "math.sqrt(r)", "r"),
    Mutant("ia3", "output's vector on the input", "self.l[:, None] * weight", "weight * self.l[:, None].mean()"),
    Mutant("ia3", "bias not scaled", "else bias * self.l", "else bias"),
    Mutant("ia3", "vector not repeated over a kernel", "repeat_interleave(self.kernel)", "repeat(self.kernel)"),
    Mutant(
        "hra",
        "reflections in the wrong order",
        "reversed(self.U.to(x.dtype).unbind(1))",
        "self.U.to(x.dtype).unbind(1)",
    ),
    Mutant("hra", "vectors not normalised", "self.hra_u / self.hra_u.norm(dim=0)", "self.hra_u"),
    Mutant("hra", "half a reflection", "x - 2 * (x @ u)", "x - (x @ u)", place="factors.py"),
    Mutant("oft", "transposed rotation, weight", '"onc,nkc->onk"', '"onk,nkc->onc"'),
    Mutant(
        "oft", "transposed rotation, both ways", "return self._dropped(R).expand", "return self._dropped(R.mT).expand"
    ),
    Mutant("oft", "projection not passed by the gradient", "Q + (drawn - Q).detach()", "drawn"),
    Mutant("oft", "series one term short", "last = terms - 1 if", "last = terms - 2 if", place="factors.py"),
]
