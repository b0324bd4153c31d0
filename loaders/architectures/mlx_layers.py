"""What mlx-lm works out of a layer's number, held against the list in config.json that says it of each layer.

Where the list fits a number that mlx-lm reads, that number is written to config.json; a checkpoint whose list fits none
would load, and compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.architectures.layers import MOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A list of config.json, and the layers of which mlx-lm takes something for granted.

    key: the list, an entry a layer; or with `value` None, a list of the numbers of those layers.
    value: what the list says of these layers, and of no other.
    every, first: the setting that mlx-lm reads. They are the layers whose number, from 1, it divides, or the first so
    many; a number instead of a setting's name is mlx-lm's own, which cannot be set.
    spelled, letters: the setting that mlx-lm reads is a letter a layer, taken in turn: the first of the two is for
    these layers.
    flags: the setting that mlx-lm reads has true for these layers, and false for the others.
    says: what mlx-lm does, for a message.
    """

    key: str
    says: str = ""
    value: Any = None
    every: str | int | None = None
    first: str | int | None = None
    spelled: str = ""
    letters: str = ""
    flags: str = ""

    def fault(self, text: Mapping[str, Any]) -> str | None:
        """Say what mlx-lm would do at other places than the config says, or return None."""
        chosen = self._chosen(text)
        return (
            None
            if chosen is None or self.spelled or self.flags or self._number(chosen) is not None
            else f"{self.says}, not as {self.key} says"
        )

    def setting(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """Return the setting with which mlx-lm does what the list says; nothing if there is no list."""
        chosen, key = self._chosen(text), self.every if self.every is not None else self.first
        if chosen is not None and self.flags:
            return {self.flags: chosen}
        if chosen is not None and self.spelled:
            return self._spelt(chosen, text)
        number = None if chosen is None else self._number(chosen)
        return {key: number} if isinstance(key, str) and number is not None else {}

    def _chosen(self, text: Mapping[str, Any]) -> list[bool] | None:
        found, count = text.get(self.key), text.get("num_hidden_layers")
        if not isinstance(found, list) or not found or type(count) is not int or not 0 < count <= MOST:
            return None
        return [layer in found for layer in range(count)] if self.value is None else [e == self.value for e in found]

    def _spelt(self, chosen: list[bool], text: Mapping[str, Any]) -> dict[str, Any]:
        yes, no = self.letters[0], self.letters[1]
        wanted, found = [yes if each else no for each in chosen], text.get(self.spelled)
        if isinstance(found, str) and found and wanted == [found[i % len(found)] for i in range(len(chosen))]:
            return {}
        return {self.spelled: "".join(wanted) if any(chosen) else None}

    def _number(self, chosen: list[bool]) -> int | None:
        """Return the number that gives these layers, or None."""
        if self.every is not None:
            number = chosen.index(True) + 1 if True in chosen else len(chosen) + 1
            fits = chosen == [(layer + 1) % number == 0 for layer in range(len(chosen))]
        else:
            number = chosen.index(False) if False in chosen else len(chosen)
            fits = not any(chosen[number:])
        fixed = self.every if self.every is not None else self.first
        return number if fits and (isinstance(fixed, str) or fixed == number) else None


def places_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Place, ...]:
    """Return the places of a table's rows."""
    return tuple(Place(**row) for row in rows)
