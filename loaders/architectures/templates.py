"""Names with their numbers left open: what a family says of a name is found once for all names of the same form.

A large mixture of experts has tens of thousands of names, and a few dozen forms: "model.layers.{}.mlp.experts.{}.
up_proj.weight". A family's rows tell names apart by words, never by the number of a layer or of an expert, which this
relies on, but for layers beyond those that config.json counts; digits inside a word, as in "w1", are part of the form.
"""

from __future__ import annotations

import re

from loaders.architectures.family import Family, Traits
from loaders.dtypes import Shape

NUMBER = re.compile(r"(?<=\.)([0-9]+)(?=\.)")
# What stands for the numbers of a name while its form is looked up: a number that is in no name, and its index.
STAND_IN = "900719925474099"
STANDING_IN = re.compile(rf"{STAND_IN}([0-9]{{2}})")
MOST = 100  # numbers in a name; more do not fit into the two digits of the index

Form = tuple[str, ...]  # the text around the numbers
Open = tuple[str | int, ...]  # text, and indices of numbers, in turn


class KnownTraits:
    """A family's traits of names, remembered by the names' form and the tensor's shape."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._known: dict[tuple[Form, Shape], tuple[str, Open, Open | None]] = {}
        # Every tensor of a block gets the same text, which tens of thousands of copies would only waste memory for.
        self._texts: dict[str, str] = {}

    def __call__(self, name: str, shape: Shape) -> Traits:
        """Return what `Family.traits` returns."""
        parts = NUMBER.split(name)
        form, numbers = tuple(parts[::2]), parts[1::2]
        if len(numbers) >= MOST or STAND_IN in name or self._family.names.is_beyond(name):
            return self._family.traits(name, shape)
        known = self._known.get((form, shape))
        if known is None:
            known = self._known[form, shape] = self._look_up(form, shape)
        role, block, group = known
        return Traits(role, self._filled(block, numbers), None if group is None else self._filled(group, numbers))

    def _look_up(self, form: Form, shape: Shape) -> tuple[str, Open, Open | None]:
        name = form[0] + "".join(f"{STAND_IN}{index:02}{text}" for index, text in enumerate(form[1:]))
        traits = self._family.traits(name, shape)
        return traits.role, _opened(traits.block), None if traits.group is None else _opened(traits.group)

    def _filled(self, text: Open, numbers: list[str]) -> str:
        made = "".join([part if isinstance(part, str) else numbers[part] for part in text])
        return self._texts.setdefault(made, made)


def _opened(text: str) -> Open:
    return tuple(int(part) if index % 2 else part for index, part in enumerate(STANDING_IN.split(text)))
