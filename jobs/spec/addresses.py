"""Whether a service answers, asked before anything waits for it."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from loaders.errors import StorageError

PATIENCE_S = 5.0
PORTS = {"http": 80, "https": 443}


def check_reachable(key: str, address: str, remedy: str) -> None:
    """Connect to an address (HOST:PORT or a URL) and leave again.

    Raises:
        StorageError: nobody answers there.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or PORTS.get(parts.scheme)
        if parts.hostname is None or port is None:
            return
        with socket.create_connection((parts.hostname, port), timeout=PATIENCE_S):
            pass
    except (OSError, ValueError) as error:
        raise StorageError(f"{key}: nobody answers at {address} ({error}); is it running? {remedy}") from None
