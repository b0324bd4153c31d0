"""The text of what jobs.clean found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from jobs.report.tables import size, table
from loaders.storage.address import Address


def leftovers_text(rows: Sequence[Mapping[str, Any]], place: Address) -> RenderableType:
    """Return a table with one row for each leftover found at `place`."""
    if not rows:
        return f"nothing abandoned in {place}"
    shown = table("status", "units done", "size", "hours ago", "folder")
    for row in rows:
        shown.add_row(
            row["status"], str(row["units_done"]), size(row["bytes"]), f"{row['age_s'] / 3600:.1f}", row["path"]
        )
    return shown
