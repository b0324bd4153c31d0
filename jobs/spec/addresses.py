"""A check that a network service answers, before libraries wait for it with long timeouts of their own."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from loaders.errors import StorageError
from loaders.storage.address import without_secrets

# Seconds to wait for a connection: far more than any reachable service needs, and far less than the minutes for which
# Ray and MLflow retry.
PATIENCE_S = 5.0
PORTS = {"http": 80, "https": 443}


def check_reachable(key: str, address: str, remedy: str) -> None:
    """Connect to an address (HOST:PORT or a URL) and close the connection. An address without a port is not checked.

    Raises:
        StorageError: the connection fails; `key` is the setting that the message names, `remedy` its last words.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or PORTS.get(parts.scheme)
        if parts.hostname is None or port is None:
            return
        with socket.create_connection((parts.hostname, port), timeout=PATIENCE_S):
            pass
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{key}: nobody answers at {without_secrets(address)} ({error}); is it running? {remedy}"
        ) from None
