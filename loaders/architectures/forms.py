"""Forms: how an engine holds a tensor, where that differs from the published checkpoint, as rows of a family's table.

A row is found by a tensor's published name. It may show the tensor's elements in another arrangement (`view`), as one
tensor or cut into several, or change its values (`values`); what these words do is in
`loaders.tensors.form_views` and `form_values` there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A row: `name` is searched in a tensor's published name, or in the one that a row before has given it.

    Every row that fits counts, each for what the rows before have made; in a row come the view, the values, the times.

    view, values: the words for what is done; empty for nothing.
    by: the settings that a word of `values` takes; "key.0" is an entry of a list.
    times: keys of config.json whose numbers the values are multiplied by, in this order; KEY.2 is the third of a list.
    to: the names of the pieces in the published style, expanded with the groups of `name`; the tensor's own if empty.
    Where a view gives more pieces than there are names, "{}" in these is counted up: an expert's number.
    role: the role of the pieces, where the tensor's own does not tell it.
    """

    name: re.Pattern[str]
    view: str = ""
    values: str = ""
    to: tuple[str, ...] = ()
    role: str = ""
    by: tuple[str, ...] = ()
    times: tuple[str, ...] = ()


def forms_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Form, ...]:
    """Return the forms of a table's rows."""
    return tuple(
        Form(
            name=re.compile(row["name"]),
            view=row.get("view", ""),
            values=row.get("values", ""),
            to=tuple(row.get("to", ())),
            role=row.get("role", ""),
            by=tuple(row.get("by", ())),
            times=tuple(row.get("times", ())),
        )
        for row in rows
    )  # fmt: skip
