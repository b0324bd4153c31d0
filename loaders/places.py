"""The paths of this package's own folders. No other file derives paths from its own location."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # a checkout's top, or site-packages
CONF = ROOT / "conf"
DEMO = ROOT / "jobs" / "demo"


@cache
def code_digest() -> str:
    """Return the first digits of the SHA-256 of all code of `jobs` and `loaders`, in the order of the files' names."""
    found = hashlib.sha256()
    for file in sorted(file for name in ("jobs", "loaders") for file in (ROOT / name).rglob("*.py")):
        found.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:12]
