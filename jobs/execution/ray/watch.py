"""A watch for machines of a Ray cluster that die."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

WATCH_S = 2.0  # seconds between two looks


class Watch:
    """A watch for machines that die, on a thread of its own, since asking Ray can block."""

    def __init__(self, ray: Any) -> None:
        self.dead: dict[str, float] = {}
        self._ray = ray
        self._known = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
        self._stop = threading.Event()
        threading.Thread(target=self._look, name="ray-watch", daemon=True).start()

    def _look(self) -> None:
        while not self._stop.wait(WATCH_S):
            # Ray may not answer while a machine dies; the next look asks again.
            with contextlib.suppress(Exception):
                for node in self._ray.nodes():
                    if not node["Alive"] and node["NodeID"] not in self._known:
                        self.dead.setdefault(node["NodeID"], time.monotonic())

    def close(self) -> None:
        self._stop.set()
