"""Numbers as people say them: bytes, seconds, shares."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in words: 1.2 MB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def rate(tokens: float) -> str:
    """Tokens per second in words: 850 tok/s, 12.3k tok/s."""
    return f"{tokens:.0f} tok/s" if tokens < 1000 else f"{tokens / 1000:.1f}k tok/s"


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent, never a false zero."""
    if not whole or not part:
        return "0 %"
    value = 100 * part / whole
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
