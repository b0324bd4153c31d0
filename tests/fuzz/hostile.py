"""The inputs that were once read wrongly: tests/hostile/READER/NAME/..., and a line on each in cases.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.cases import Case

FOLDER = Path(__file__).resolve().parents[1] / "hostile"
LINES = FOLDER / "cases.jsonl"


@dataclass(frozen=True)
class Kept:
    """A case, and what it was when it was found. One `is_refused` must be; the others may be read as well."""

    reader: str
    name: str
    was: str
    case: Case
    is_refused: bool


def kept(reader: str | None = None) -> Iterator[Kept]:
    """Yield the cases of a reader, or of all."""
    for line in LINES.read_text().splitlines() if LINES.exists() else ():
        row = json.loads(line)
        if reader in (None, row["reader"]):
            folder = FOLDER / row["reader"] / row["name"]
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
            case = Case(row.get("seed", ""), files, tuple(row.get("words", ())))
            yield Kept(row["reader"], row["name"], row["was"], case, row.get("refused", False))


def keep(reader: str, was: str, case: Case) -> Path:
    """Write a case, and its line; returns its folder."""
    number = 1 + max((int(each.name.split("-")[0]) for each in kept(reader)), default=0)
    name = f"{number:03d}-{was.partition(' ')[0].lower().strip(':')}"
    folder = FOLDER / reader / name
    folder.mkdir(parents=True)
    for path, data in case.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    row = {"reader": reader, "name": name, "was": was, "seed": case.seed, "words": list(case.words)}
    with LINES.open("a") as file:
        file.write(json.dumps({key: value for key, value in row.items() if value}) + "\n")
    return folder
