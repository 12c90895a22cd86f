"""Regular expressions that come to an end: a pattern may stand in a file, and backtracking can take for ever."""

from __future__ import annotations

import functools
import math
import re
import time
from typing import Any

from deltatune.errors import ConfigError, LimitError

MAX_LENGTH = 10_000  # characters of a pattern
MAX_REPEATS = 10_000  # product of its counted repetitions, which compiling writes out
SECONDS = 0.5  # that matching may take beyond EACH for every match
EACH = 0.001


class _Watch:
    """Time that matches took beyond what is usual; many slow ones are as bad as one that does not end."""

    spent = 0.0


def fullmatch(pattern: str, text: str) -> bool:
    """`re.fullmatch`, or LimitError."""
    return _timed(pattern, "fullmatch", text) is not None


def match(pattern: str, text: str) -> Any:
    """`re.match`, or LimitError."""
    return _timed(pattern, "match", text)


def search(pattern: str, text: str) -> Any:
    """`re.search`, or LimitError."""
    return _timed(pattern, "search", text)


def check(owner: str, field: str, pattern: str) -> None:
    """Refuse what is no regular expression, or one that may take all memory.

    Raises:
        ConfigError: It does not compile.
        LimitError: It is too long, or repeats too much.
    """
    repeats = math.prod(max(1, int(count)) for count in re.findall(r"(\d{1,9})\d*\}", pattern))
    if len(pattern) > MAX_LENGTH or repeats > MAX_REPEATS:
        raise LimitError(
            f"{owner}: {field} is a pattern of {len(pattern)} characters whose counted repetitions multiply to "
            f"{repeats}; up to {MAX_LENGTH} and {MAX_REPEATS} are taken, list the names instead",
            field=field,
            found=pattern[:200],
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        place = f" at position {error.pos}" if isinstance(error, re.error) else ""
        raise ConfigError(
            f"{owner}: {field}={pattern[:200]!r} is no regular expression: {getattr(error, 'msg', error)}{place}",
            field=field,
            found=pattern,
        ) from None


def _timed(pattern: str, verb: str, text: str) -> Any:
    started = time.perf_counter()
    try:
        return getattr(_compiled(pattern), verb)(text, timeout=max(SECONDS - _Watch.spent, 0.01))
    except TimeoutError:
        _Watch.spent = 0.0
        raise LimitError(
            f"the pattern {pattern[:200]!r} takes more than {SECONDS:g} s to match; write it without nested "
            "repetitions, or list the names",
            found=pattern,
            expected=SECONDS,
        ) from None
    finally:
        _Watch.spent = max(0.0, _Watch.spent + time.perf_counter() - started - EACH)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    import regex  # as `re`, with a limit of time; here, because `import deltatune` loads torch alone

    check("pattern", "pattern", pattern)
    return regex.compile(pattern)
