"""The paths of this package's own folders. No other file derives paths from its own location."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # a checkout's top, or site-packages
CONF = ROOT / "conf"
DEMO = ROOT / "jobs" / "demo"
