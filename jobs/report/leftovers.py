"""The text of what `weightmill clean` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from jobs.report.tables import size, table
from loaders.storage.address import Address

KEPT = "kept: the originals' numbers for verify=logits and verify=embeddings, which are computed again if deleted"


def leftovers_text(
    rows: Sequence[Mapping[str, Any]], places: Sequence[Address], *, deletable: int, of_the_hub: int
) -> RenderableType:
    """Return a table with one row for each leftover found at `places`, and how to delete them.

    The place after the first is where the journal of an output of the first's name would be.

    `deletable` are the bytes that delete=true would delete, and `of_the_hub` the rows that it leaves.
    """
    place, *beside = map(str, places)
    looked = " ".join([place, *(f"nor, of an output of that name, in {each}" for each in beside)])
    if not rows:
        return f"nothing abandoned in {looked}"
    numbers = ("size", "hours ago", "units done")
    shown = table("folder", "status", *numbers, right=numbers)
    for row in rows:
        hours, units = f"{row['age_s'] / 3600:.1f}", str(row["units_done"])
        shown.add_row(row["path"].removeprefix(f"{place}/"), row["status"], size(row["bytes"]), hours, units)
    more = [KEPT] if any(row["status"] == "kept" for row in rows) else []
    more += [f"nothing was deleted; delete=true deletes {size(deletable)}"] if deletable else []
    if of_the_hub:
        more.append(f"{of_the_hub} of outputs on the Hub: output.root=hf://OWNER delete=true deletes them")
    return Group(f"in {' and, of an output of that name, in '.join([place, *beside])}:", shown, *more)
