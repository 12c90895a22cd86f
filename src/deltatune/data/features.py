"""An example as numbers."""

from dataclasses import dataclass, field

IGNORE = -100  # the index that torch's cross entropy leaves out


@dataclass(frozen=True)
class Features:
    """One example, ready for the model. `targets` is how many predictions its loss is a mean over."""

    input_ids: list[int]
    labels: list[int]  # tokens, one class number, a class number at each token, or the first and last token of a span
    targets: int
    task_id: int | None = field(default=None, kw_only=True)

    @property
    def length(self) -> int:
        return max(len(self.input_ids), len(self.labels))
