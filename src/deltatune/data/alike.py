"""When two texts count as the same."""

import re
import unicodedata

_NO_WORD = re.compile(r"[\W_]+")


def normal(text: str) -> str:
    """Without regard to case, accents' encoding, punctuation and blanks."""
    return _NO_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip() or text
