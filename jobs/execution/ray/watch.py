"""A watch for what becomes of a Ray cluster: machines that die or are about to leave, and a head that is silent."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.cli.early import is_program
from jobs.execution.cluster import GO_ON, ClusterLost

WATCH_S = 2.0  # seconds between two looks
ASK_S = 3.0  # seconds that the head has to say that it is there
# Seconds without a word from the head after which the job ends. Ray's own patience is a minute, see start.py; what it
# does then ends the process at once.
SILENT_S = 40.0
# If the job does not end then, since one of Ray's calls does not return, the process does.
EXIT_S = 55.0


class Watch:
    """A watch on a thread of its own, since asking Ray can block.

    `nodes` is the latest list of the cluster's machines (`ray.nodes()`), `dead` has those that died since the watch
    began, and `leaving` those that drain: a notice was given that they will go. `available` has what is free on each.
    """

    def __init__(self, ray: Any, where: str) -> None:
        self._ray = ray
        self._where = where
        self.nodes: Sequence[Mapping[str, Any]] = ray.nodes()
        self.dead: dict[str, float] = {}
        self.leaving: frozenset[str] = frozenset()
        self.available: Mapping[str, Mapping[str, float]] = {}
        self._known = {node["NodeID"] for node in self.nodes if not node["Alive"]}
        self._heard_s = time.monotonic()
        self._stop = threading.Event()
        threading.Thread(target=self._watch, name="ray-watch", daemon=True).start()

    def _watch(self) -> None:
        looking = threading.Thread(target=self._look_on, name="ray-look", daemon=True)
        looking.start()
        while not self._stop.wait(WATCH_S):
            if self.silent_s > EXIT_S and is_program():
                print(f"weightmill: failed: {self._words}; {GO_ON}", file=sys.stderr, flush=True)
                os._exit(1)

    def _look_on(self) -> None:
        while not self._stop.wait(WATCH_S):
            # The head may not answer while a machine dies, or at all; the next look asks again.
            with contextlib.suppress(Exception):
                self._look()

    def _look(self) -> None:
        # Without a limit of time, other questions wait until Ray ends the process.
        self._ray._private.worker.global_worker.gcs_client.check_alive([], timeout=ASK_S)
        nodes = self._ray.nodes()
        self._heard_s = time.monotonic()
        for node in nodes:
            if not node["Alive"] and node["NodeID"] not in self._known:
                self.dead.setdefault(node["NodeID"], self._heard_s)
        self.available = self._ray._private.state.available_resources_per_node()
        self.nodes = nodes
        self.leaving = frozenset(self._ray._private.state.state.get_draining_nodes())

    def check(self) -> None:
        """Check that the cluster still has its head.

        Raises:
            ClusterLost: nothing was heard of it for SILENT_S.
        """
        if self.silent_s > SILENT_S:
            raise ClusterLost(self._words)

    def await_head(self) -> None:
        """Wait until the head answers, as it does at once if it is there.

        Raises:
            ClusterLost: nothing was heard of it for SILENT_S.
        """
        while self.silent_s > WATCH_S + ASK_S:
            self.check()
            time.sleep(0.1)

    @property
    def silent_s(self) -> float:
        """Seconds since the head was last heard of."""
        return time.monotonic() - self._heard_s

    @property
    def _words(self) -> str:
        return f"cluster: the head of {self._where} has not answered for {self.silent_s:.0f} s"

    def close(self) -> None:
        self._stop.set()
