"""An example as numbers."""

from dataclasses import dataclass, field

IGNORE = -100  # the index that torch's cross entropy leaves out


@dataclass(frozen=True)
class Features:
    """One example, ready for the model. `targets` is how many predictions its loss is a mean over.

    `whole` is how many tokens it had before a limit cut it.
    """

    input_ids: list[int]
    labels: list[int]  # tokens, one class number, a class number at each token, or the first and last token of a span
    targets: int
    task_id: int | None = field(default=None, kw_only=True)
    whole: int = field(default=0, kw_only=True)

    @property
    def length(self) -> int:
        return max(len(self.input_ids), len(self.labels))

    @property
    def rows(self) -> int:
        """How many rows of the data it is."""
        return 1
