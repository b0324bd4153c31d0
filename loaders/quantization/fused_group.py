"""What fused partners (q/k/v, gate/up) must have in common: found once a group, by whichever of them comes first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from loaders.quantization.scheme import Scheme, Sharing, View, Work


class FusedGroups:
    """Schemes that know what their group shares, such as NVFP4's global scale."""

    def __init__(self) -> None:
        self._schemes: dict[str, Scheme] = {}
        self._locks: dict[str, threading.Lock] = {}

    def scheme_of(self, group: str, scheme: Sharing, views: Callable[[], Sequence[View]], work: Work) -> Scheme:
        """The scheme, knowing what the group shares; `views` are those of all partners that it encodes."""
        # A partner on another thread waits, rather than read the whole group a second time.
        with self._locks.setdefault(group, threading.Lock()):
            if group not in self._schemes:
                self._schemes[group] = scheme.share(views(), work)
            return self._schemes[group]
