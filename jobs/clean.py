"""Remove what interrupted jobs left beside their outputs, and kept logits: python -m jobs.clean."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from jobs.console import Said, Verb
from jobs.journal import LOGITS
from jobs.strict import Format, Spec


class Place(Spec):
    """Where to look."""

    root: str = Field(description="a folder of outputs to look into")
    path: str | None = Field(description="only what belongs to this output")


class CleanSpec(Spec):
    """What to clean."""

    output: Place
    dry_run: bool = Field(description="only list")
    format: Format = Field(description="text, or json: one document on standard output")


def act(spec: CleanSpec) -> Said:
    """Find journals that no process works on, and remove them."""
    import shutil

    from rich.console import Group
    from rich.table import Table

    from jobs.journal import find_journals, is_held
    from jobs.report import size
    from loaders.errors import io_errors

    only = None if spec.output.path is None else Path(spec.output.path)
    folder = only.parent if only is not None else Path(spec.output.root)
    found: list[dict[str, Any]] = []
    paths = find_journals(folder, None if only is None else only.name)
    if only is None and (folder / LOGITS).is_dir():
        paths.append(folder / LOGITS)
    for path in paths:
        files = [p for p in path.rglob("*") if p.is_file()]
        held = is_held(path)
        left = "removed" if not spec.dry_run else "kept" if path.name == LOGITS else "abandoned"
        row: dict[str, Any] = {
            "path": str(path),
            "bytes": sum(p.stat().st_size for p in files),
            "units_done": sum(p.parent.name == "records" for p in files),
            "age_s": time.time() - max((p.stat().st_mtime for p in files), default=path.stat().st_mtime),
            "status": "in use" if held else left,
        }
        if not held and not spec.dry_run:
            with io_errors("removing", path):
                shutil.rmtree(path)
        found.append(row)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("status", "units done", "size", "hours ago", "folder"):
        table.add_column(column, overflow="fold")
    for row in found:
        table.add_row(
            row["status"], str(row["units_done"]), size(row["bytes"]), f"{row['age_s'] / 3600:.1f}", row["path"]
        )
    text = Group(table) if found else f"nothing abandoned in {folder}"
    return Said({"status": "done", "dry_run": spec.dry_run, "found": found}, text)


VERB = Verb(
    "clean",
    "List what interrupted jobs left beside their outputs, and remove it; they can then no longer be resumed."
    " The originals' logits that verify=logits keeps there go, too; they are computed again when needed.",
    CleanSpec,
    act,
    (
        ("", "in output.root"),
        ("dry_run=true", "only list"),
        ("output.path=OUT", "what was left of one output"),
    ),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
