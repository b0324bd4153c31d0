"""Where this package lies: the one place that works out paths from a file's own."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # a checkout's top, or site-packages
CONF = ROOT / "conf"
DEMO = ROOT / "jobs" / "demo"
