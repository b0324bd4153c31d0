"""The large checkpoint, written once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loaders.models.large import write_large


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A gigabyte of weights; gone when the tests are."""
    folder = tmp_path_factory.mktemp("models") / "large"
    write_large(folder)
    yield folder
    shutil.rmtree(folder)
