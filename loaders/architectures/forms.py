"""Forms: how an engine holds a tensor, where that differs from the published checkpoint, as rows of a family's table.

A row is found by a tensor's published name. It may show the tensor's elements in another arrangement (`view`), as one
tensor or cut into several, or change its values (`values`); what these words do is in `loaders.tensors.formed`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Form:
    """A row: `name` is searched in a tensor's published name.

    view, values: the words for what is done; empty for nothing.
    times: keys of config.json whose numbers the values are multiplied by, in this order; KEY.2 is the third of a list.
    to: the names of the pieces in the published style, expanded with the groups of `name`; the tensor's own if empty.
    """

    name: re.Pattern[str]
    view: str = ""
    values: str = ""
    to: tuple[str, ...] = ()
    times: tuple[str, ...] = ()


def forms_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Form, ...]:
    """Return the forms of a table's rows."""
    return tuple(
        Form(
            re.compile(row["name"]), row.get("view", ""), row.get("values", ""), tuple(row.get("to", ())),
            tuple(row.get("times", ())),
        )
        for row in rows
    )  # fmt: skip
