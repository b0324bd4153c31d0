"""What jobs.clean found, as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from jobs.report.tables import size, table


def leftovers_text(rows: Sequence[Mapping[str, Any]], folder: Path) -> RenderableType:
    """A row for each folder that was found in `folder`."""
    if not rows:
        return f"nothing abandoned in {folder}"
    shown = table("status", "units done", "size", "hours ago", "folder")
    for row in rows:
        shown.add_row(
            row["status"], str(row["units_done"]), size(row["bytes"]), f"{row['age_s'] / 3600:.1f}", row["path"]
        )
    return shown
