"""Tests that the Python of pages in docs/ runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.readme import README
from tests.test_readme import run_blocks

PAGES = ["models.md"]


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", PAGES)
def test_the_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("torch", "transformers", "bitsandbytes"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTMILL_CACHE", str(tmp_path / "cache"))
    page = README.parent / "docs" / name
    wanted = page.read_text().count("```python")
    assert wanted > 0
    assert run_blocks(page, tmp_path) == wanted
