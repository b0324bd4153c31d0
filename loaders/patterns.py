"""Regular expressions of strangers: what Python's `re` would find, in time that they cannot choose.

Python's own engine tries every way to match, and cannot be left while it does: it gets patterns with few ways. RE2
takes time linear in the text; what it has no words for, such as a lookahead, is matched by the package `regex`, which
ends when its time is over. Both get the pattern in words that all three engines understand alike.
"""

from __future__ import annotations

import re
import time
import warnings
from functools import lru_cache
from re import _parser  # type: ignore[attr-defined]  # parses without compiling, which can take long
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.limits import PATTERN, PATTERN_SECONDS, shown

# A piece of a pattern whose words could mean another thing elsewhere: an escape, a set, a brace.
PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<least>\d*),(?P<most>\d*)\}|\{\d+\}|[{}]", re.DOTALL)
IN_SET = re.compile(r"\\.|[\[&|~]", re.DOTALL)
REPEATS, CHOICES, MOST_CHOICES = re.compile(r"[*+{]"), re.compile(r"[|?]"), 8  # 256 ways to match at most
# What RE2 reads as an octal number, Python as the number of a group.
GROUP_NUMBER = re.compile(r"(?:^|[^\\])(?:\\\\)*\\[1-9]")


class Pattern:
    """A regular expression: `match`, `search` and `fullmatch` say whether Python's `re` would find it in a text."""

    def __init__(self, pattern: str, place: str) -> None:
        """Raises BadCheckpoint: see `compiled`, which keeps patterns."""
        if len(pattern) > PATTERN:
            raise BadCheckpoint(f"{place}: a pattern of {len(pattern)} characters, at most {PATTERN} are read")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _parser.parse(pattern)
        except (re.error, RecursionError, OverflowError, ValueError) as error:
            raise BadCheckpoint(f"{place}: {shown(pattern)} is no regular expression: {error}") from None
        self.pattern, self.place = pattern, place
        self._linear: Any = None
        if not REPEATS.search(pattern) and len(CHOICES.findall(pattern)) <= MOST_CHOICES:
            self._own: re.Pattern[str] | None = _own(pattern, place)
        else:
            self._own = None
            if pattern.isascii() and not GROUP_NUMBER.search(pattern):
                self._linear = _linear(_common(pattern))
        self._other: Any = None
        self._left_s = PATTERN_SECONDS

    def match(self, text: str) -> bool:
        """Whether it matches at the beginning of a text."""
        return self._find("match", text)

    def search(self, text: str) -> bool:
        """Whether it matches anywhere in a text."""
        return self._find("search", text)

    def fullmatch(self, text: str) -> bool:
        """Whether it matches the whole of a text.

        Raises:
            BadCheckpoint: it takes too long; as `match` and `search` do.
        """
        return self._find("fullmatch", text)

    def _find(self, how: str, text: str) -> bool:
        if self._own is not None:
            return getattr(self._own, how)(text) is not None
        # RE2's classes (\w, \s, \d) are of ASCII, and its $ is no place before the last newline.
        if self._linear is not None and text.isascii() and text.isprintable():
            return getattr(self._linear, how)(text) is not None
        import regex

        began = time.monotonic()
        try:
            if self._other is None:
                self._other = regex.compile(_common(self.pattern), regex.VERSION0)
            return getattr(self._other, how)(text, timeout=max(self._left_s, 1e-3)) is not None
        except TimeoutError:
            raise BadCheckpoint(
                f"{self.place}: the pattern {shown(self.pattern)} takes too long to match; write it more simply"
            ) from None
        except (regex.error, RecursionError, MemoryError, OverflowError) as error:
            raise BadCheckpoint(f"{self.place}: the pattern {shown(self.pattern)} cannot be matched: {error}") from None
        finally:
            self._left_s -= time.monotonic() - began


@lru_cache(maxsize=4096)
def compiled(pattern: str, place: str) -> Pattern:
    """Compile a regular expression from a stranger; `place` begins the message if it is refused, and it is kept.

    Raises:
        BadCheckpoint: it is none, or too long.
    """
    return Pattern(pattern, place)


def _own(pattern: str, place: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadCheckpoint(f"{place}: {shown(pattern)} is no regular expression: {error}") from None


def _linear(pattern: str) -> Any:
    """Compile for RE2; None if it has no words for the pattern, or too little room."""
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        # Not re2.compile, which keeps 128 patterns and throws all away at the next.
        return re2._Regexp(pattern, options)
    except re2.error:
        return None


def _common(pattern: str) -> str:
    """Return a pattern that Python has accepted in words that mean the same elsewhere.

    Only Python takes {,3} for a repeat, {a} for letters, and [[:a:]] or [a&&b] for sets of those letters.
    """

    def said(found: re.Match[str]) -> str:
        piece = found[0]
        if piece[0] == "[":
            return "[" + IN_SET.sub(lambda inner: inner[0] if inner[0][0] == "\\" else "\\" + inner[0], piece[1:])
        if found["most"] is not None:
            return f"{{{found['least'] or 0},{found['most']}}}"
        return "\\" + piece if piece in "{}" else piece

    return PIECE.sub(said, pattern)
