"""Class names and their numbers, fixed by the training rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltatune.data.example import Columns, Example
from deltatune.data.read import Table
from deltatune.data.tagging import Tagged
from deltatune.errors import DataError


@dataclass(frozen=True)
class Labels:
    """`keys[i]` is how class i is written in the data, `names[i]` how it is shown."""

    keys: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def number(self, key: str, line: int, source: str) -> int:
        try:
            return self.keys.index(key)
        except ValueError:
            # a number means something to the reader beside its name
            shown = [one if one == name else f"{one} ({name})" for one, name in zip(self.keys, self.names)]
            most = 8 if self.keys == self.names else 3
            known = ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")
            raise DataError(
                f"{source} line {line}: label {key!r} never occurs in the training data; expected one of {known}",
                path=source,
                key=str(line),
                field="label",
                found=key,
                expected=list(self.keys),
            ) from None


def keys_of(example: Example) -> tuple[str, ...]:
    """The classes of a row: one, or one for each of its words."""
    return example.tags if isinstance(example, Tagged) else (example.target or "",)


def collect_labels(tables: Sequence[Table], columns: Sequence[Columns], examples: Sequence[list[Example]]) -> Labels:
    """The classes of all tables in a stable order: by number where all are numbers, else by name."""
    keys = {key for rows in examples for example in rows for key in keys_of(example)}
    numeric = all(key.lstrip("-").isdigit() for key in keys)
    ordered: tuple[str, ...] = tuple(sorted(keys, key=int) if numeric else sorted(keys))
    if len(ordered) < 2:
        source = ", ".join(table.source for table in tables)
        raise DataError(
            f"{source}: every row has the label {next(iter(keys), '')!r}; classification needs two classes or more",
            path=source,
            field=columns[0].target,
            found=list(ordered),
            expected="at least two classes",
        )
    shown = _shown(tables, columns, examples)
    return Labels(ordered, tuple(shown.get(key, key) for key in ordered))


def known_labels(
    names: Sequence[str], tables: Sequence[Table], columns: Sequence[Columns], examples: Sequence[list[Example]]
) -> Labels:
    """The classes of a trained model, as the tables write them: by their names, by a second column, or by number."""
    keys = {key for rows in examples for example in rows for key in keys_of(example)}
    written = {name: key for key, name in _shown(tables, columns, examples).items()}
    found = [written.get(name, name) for name in names]
    numbers = [str(number) for number in range(len(names))]
    if not keys & set(found) and keys <= set(numbers):
        found = numbers
    return Labels(tuple(found), tuple(names))


def _shown(tables: Sequence[Table], columns: Sequence[Columns], examples: Sequence[list[Example]]) -> dict[str, str]:
    """Classes and the names that a second column gives them."""
    shown: dict[str, str] = {}
    for table, found, rows in zip(tables, columns, examples):
        if found.label_names:
            by_line = dict(zip(table.lines, table.rows))
            shown |= {e.target: str(by_line[e.line].get(found.label_names)) for e in rows if e.target is not None}
    return shown
