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
from loaders.limits import LIST_SECONDS, PATTERN, PATTERN_SECONDS, PATTERN_TRIES, shown

# A piece of a pattern whose words could mean another thing elsewhere: an escape, a set, a brace.
PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<least>\d*),(?P<most>\d*)\}|\{\d+\}|[{}]", re.DOTALL)
IN_SET = re.compile(r"\\.|[\[&|~]", re.DOTALL)
REPEATS, CHOICES, MOST_CHOICES = re.compile(r"[*+{]"), re.compile(r"[|?]"), 8  # 256 ways to match at most
# What RE2 reads as an octal number, Python as the number of a group.
GROUP_NUMBER = re.compile(r"(?:^|[^\\])(?:\\\\)*\\[1-9]")


class Allowance:
    """What the patterns of one document may still take: tries, and seconds where no linear engine takes them."""

    def __init__(self) -> None:
        self.tries, self.seconds = PATTERN_TRIES, LIST_SECONDS

    def spend(self, tries: int, place: str) -> None:
        """Take tries off.

        Raises:
            BadCheckpoint: there are no more; `place` begins the message.
        """
        self.tries -= tries
        if self.tries < 0:
            raise BadCheckpoint(
                f"{place}: its patterns times the names that they meet are more than {PATTERN_TRIES:,}; write fewer"
                " patterns, or name the modules"
            )


class Expression:
    """A regular expression for the engine that can match it in good time."""

    def __init__(self, pattern: str, place: str) -> None:
        """Raises BadCheckpoint: see `compiled`."""
        if len(pattern) > PATTERN:
            raise BadCheckpoint(f"{place}: a pattern of {len(pattern)} characters, at most {PATTERN} are read")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _parser.parse(pattern)
        except (re.error, RecursionError, OverflowError, ValueError) as error:
            raise BadCheckpoint(f"{place}: {shown(pattern)} is no regular expression: {error}") from None
        self.pattern = pattern
        self.own: re.Pattern[str] | None = None
        self.linear: Any = None
        self.other: Any = None
        if not REPEATS.search(pattern) and len(CHOICES.findall(pattern)) <= MOST_CHOICES:
            self.own = _own(pattern, place)
        elif pattern.isascii() and not GROUP_NUMBER.search(pattern):
            self.linear = _linear(_common(pattern))

    def find(self, how: str, text: str, place: str, allowance: Allowance) -> bool:
        """Match one text.

        Raises:
            BadCheckpoint: it takes too long.
        """
        if self.own is not None:
            return getattr(self.own, how)(text) is not None
        # RE2's classes (\w, \s, \d) are of ASCII, and its $ is no place before the last newline.
        if self.linear is not None and text.isascii() and text.isprintable():
            return getattr(self.linear, how)(text) is not None
        import regex

        began = time.monotonic()
        try:
            if allowance.seconds <= 0:
                raise TimeoutError
            if self.other is None:
                self.other = regex.compile(_common(self.pattern), regex.VERSION0)
            return getattr(self.other, how)(text, timeout=min(PATTERN_SECONDS, allowance.seconds)) is not None
        except TimeoutError:
            raise BadCheckpoint(
                f"{place}: the pattern {shown(self.pattern)} takes too long to match; write it more simply"
            ) from None
        except (regex.error, RecursionError, MemoryError, OverflowError) as error:
            raise BadCheckpoint(f"{place}: the pattern {shown(self.pattern)} cannot be matched: {error}") from None
        finally:
            allowance.seconds -= time.monotonic() - began


class Pattern:
    """A regular expression: `match`, `search` and `fullmatch` say whether Python's `re` would find it in a text.

    Each raises BadCheckpoint if the allowance, which the patterns of a document share, is used up.
    """

    def __init__(self, expression: Expression, place: str, allowance: Allowance) -> None:
        self.pattern = expression.pattern
        self._expression, self._place, self._allowance = expression, place, allowance

    def match(self, text: str) -> bool:
        """Whether it matches at the beginning of a text."""
        return self._find("match", text)

    def search(self, text: str) -> bool:
        """Whether it matches anywhere in a text."""
        return self._find("search", text)

    def fullmatch(self, text: str) -> bool:
        """Whether it matches the whole of a text."""
        return self._find("fullmatch", text)

    def _find(self, how: str, text: str) -> bool:
        self._allowance.spend(1, self._place)
        return self._expression.find(how, text, self._place, self._allowance)


def compiled(pattern: str, place: str, allowance: Allowance | None = None) -> Pattern:
    """Compile a regular expression from a stranger; `place` begins the message if it is refused.

    Patterns of one document share an `allowance`; without one, a pattern has its own.

    Raises:
        BadCheckpoint: it is none, or too long.
    """
    return Pattern(_expression(pattern, place), place, allowance or Allowance())


@lru_cache(maxsize=4096)
def _expression(pattern: str, place: str) -> Expression:
    return Expression(pattern, place)


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
