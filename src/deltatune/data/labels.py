"""Class names and their numbers, fixed by the training rows."""

from dataclasses import dataclass

from deltatune.data.formats import Columns, Example
from deltatune.data.read import Table
from deltatune.errors import DataError


@dataclass(frozen=True)
class Labels:
    """`keys[i]` is how class i is written in the data, `names[i]` how it is shown."""

    keys: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def number(self, example: Example, source: str) -> int:
        try:
            return self.keys.index(example.target or "")
        except ValueError:
            known = ", ".join(self.keys[:8]) + (", ..." if len(self.keys) > 8 else "")
            raise DataError(
                f"{source} line {example.line}: label {example.target!r} never occurs in the training data; "
                f"expected one of {known}",
                path=source,
                key=str(example.line),
                field="label",
                found=example.target,
                expected=list(self.keys),
            ) from None


def collect_labels(table: Table, columns: Columns, examples: list[Example]) -> Labels:
    """The classes in a stable order: by number where all are numbers, else by name."""
    keys = {example.target or "" for example in examples}
    numeric = all(key.lstrip("-").isdigit() for key in keys)
    ordered: tuple[str, ...] = tuple(sorted(keys, key=int) if numeric else sorted(keys))
    if len(ordered) < 2:
        raise DataError(
            f"{table.source}: every row has the label {next(iter(keys))!r}; classification needs two classes or more",
            path=table.source,
            field=columns.target,
            found=list(ordered),
            expected="at least two classes",
        )
    shown = {}
    if columns.label_names:
        shown = {e.target: str(row.get(columns.label_names)) for e, row in zip(examples, table.rows, strict=True)}
    return Labels(ordered, tuple(shown.get(key, key) for key in ordered))
