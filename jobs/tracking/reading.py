"""Reading a tracking store: opened, and its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobs.spec.addresses import check_reachable
from jobs.spec.tracking import lacking
from jobs.tracking.mlflow_run import first_line, mlflow_client
from jobs.tracking.sqlite_store import SQLITE, file_of, is_missing
from loaders.errors import StorageError
from loaders.missing import not_installed
from loaders.storage.address import without_secrets


def lacks_file(uri: str) -> bool:
    """Whether an address is that of a sqlite file which does not exist; MLflow would create it."""
    return uri.startswith(SQLITE) and is_missing(file_of(uri))


def check_installed(key: str, uri: str, remedy: str) -> None:
    """Check that MLflow is installed, to read what the setting `key` names.

    Raises:
        MissingLibrary: it is not.
    """
    if lacks := lacking(uri):
        raise not_installed(f"{key}: reading MLflow", lacks, remedy)


class OpenedStore:
    """A store or server of MLflow that is read; `key` is the setting to which its errors belong.

    Raises:
        MissingLibrary: MLflow is not installed.
        StorageError: nobody answers there (then `remedy` is said), or it cannot be read.
    """

    def __init__(self, key: str, uri: str, remedy: str) -> None:
        self._key = key
        self.uri = uri
        check_installed(key, uri, remedy)
        if uri.startswith("http"):
            check_reachable(key, uri, remedy)
        with self.reading():
            self.client: Any = mlflow_client(uri)

    @property
    def shown(self) -> str:
        """The address, without a password."""
        return without_secrets(self.uri)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Make errors of the block StorageError."""
        try:
            yield
        # Stores raise errors of many libraries, without a common class.
        except Exception as error:
            raise StorageError(f"{self._key}: {self.shown} cannot be read: {first_line(error)}") from error
