"""Names and patterns of modules in a checkpoint's own config: exact names, globs, regular expressions.

They come from strangers, so that regular expressions are matched by `loaders.patterns`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import translate

from loaders.errors import BadCheckpoint
from loaders.limits import SCANNED, check_patterns, shown
from loaders.patterns import Allowance, Pattern, compiled

# What makes a pattern slow for engines, which match with Python's own `re`.
MOST_REPEATS = 5  # parts of a pattern of any length, such as .*: each multiplies the time by the length of a name
QUANTIFIER = re.compile(r"[*+?]|\{\d*,?\d*\}")
OPENING = re.compile(r"\(\?(?:[:=!>]|<[=!]|P?<\w+>|[aiLmsux-]+:?)")
ESCAPED = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]")  # what stands for one character, whatever is in it


def fault_of(pattern: str, place: str) -> str | None:
    """Say why an engine should not match a pattern: it is no regular expression, or could take very long; else None."""
    try:
        compiled(pattern, place)
    except BadCheckpoint as error:
        return str(error)
    if is_quick(pattern):
        return None
    return (
        f"{place}: the pattern {shown(pattern)} could take very long (parts of any length within each other, or more"
        f" than {MOST_REPEATS} of them); write it more simply"
    )


def is_quick(pattern: str) -> bool:
    """Whether a regular expression repeats no part that itself has a repeat or a choice, and has few repeats."""
    text = OPENING.sub("(", ESCAPED.sub("x", pattern))
    groups = [False]  # for each open group, whether it has a repeat or a choice in it
    repeats, at = 0, 0
    while at < len(text):
        quantifier = QUANTIFIER.match(text, at)
        if text[at] == "(":
            groups.append(False)
        elif text[at] == ")" and len(groups) > 1:
            has_choice = groups.pop()
            repeat = QUANTIFIER.match(text, at + 1)
            if repeat and has_choice and repeat[0] != "?":
                return False
            groups[-1] = groups[-1] or has_choice
        elif text[at] == "|" or quantifier:
            groups[-1] = True
        repeats += quantifier is not None and quantifier[0] != "?"
        at = quantifier.end() if quantifier else at + 1
    return repeats <= MOST_REPEATS


class Named:
    """A list of module names in a config: exact names, names of parts around them, globs, and "re:" patterns.

    Lists of hundreds of entries meet tens of thousands of modules, so that plain entries are looked up, not compared.
    """

    def __init__(self, entries: Iterable[str], place: str) -> None:
        self.entries, self.place = tuple(entries), place
        check_patterns(sum(e.startswith("re:") or "*" in e[:-1] for e in self.entries), place)
        self._allowance, self._left = Allowance(), SCANNED
        self._names, starts, patterns = set[str](), list[str](), list[Pattern]()
        for entry in self.entries:
            if entry.startswith("re:"):
                patterns.append(compiled(entry.removeprefix("re:"), place, self._allowance))
            elif entry.endswith("*") and "*" not in entry[:-1]:
                starts.append(entry[:-1])
            elif "*" in entry:
                patterns.append(compiled(translate(entry), place, self._allowance))
            else:
                self._names.add(entry)
        self._starts, self._patterns = tuple(starts), patterns

    def __contains__(self, module: str) -> bool:
        """Whether an entry names a module, or a part of the model that it is in, by the whole of its name."""
        parts = module.split(".")
        count = len(parts)
        return (
            any(".".join(parts[:end]) in self._names for end in range(1, count + 1))
            or any(".".join(parts[start:]) in self._names for start in range(1, count))
            or module.startswith(self._starts)
            or any(pattern.match(module) for pattern in self._patterns)
        )

    def could_mean(self, module: str) -> bool:
        """Whether an entry could mean a module in any tool's reading; see `unused`."""
        if module in self:
            return True
        self._allowance.spend(len(self.entries), self.place)
        return any(self._could_mean(entry, module, (module,)) for entry in self.entries)

    def unused(self, modules: Iterable[str]) -> list[str]:
        """Return the entries that mean none of the modules in any tool's reading.

        Tools list modules by the names that their classes have inside, so that what stands before the layers may
        differ; some take an entry for any part of a name.
        """
        names = tuple(modules)
        text = "\n".join(names)
        # Lists of tens of thousands name each module whole, or a part of the model that it is in.
        whole = {
            ".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts) + 1)
        }
        return [entry for entry in self.entries if entry not in whole and not self._could_mean(entry, text, names)]

    def _could_mean(self, entry: str, text: str, names: Iterable[str]) -> bool:
        plain = entry.removeprefix("re:").strip(".*^$")
        parts = plain.split(".")
        if self._is_in(plain, text) or any(
            self._is_in(".".join(parts[start:]), text) for start in range(1, len(parts) - 1)
        ):
            return True
        if "*" not in entry and not entry.startswith("re:"):
            return False
        patterns = []
        for pattern in (entry.removeprefix("re:"),) if entry.startswith("re:") else (entry, translate(entry)):
            with suppress(BadCheckpoint):  # a glob may be no regular expression
                patterns.append(compiled(pattern, self.place, self._allowance))
        return any(pattern.search(name) for name in names for pattern in patterns)

    def _is_in(self, part: str, text: str) -> bool:
        found = text.find(part)
        self._left -= len(text) if found < 0 else found
        if self._left < 0:
            raise BadCheckpoint(
                f"{self.place}: a list of {len(self.entries)} names, most of which no module has, takes too long to"
                " look through; name the modules that are there"
            )
        return found >= 0
