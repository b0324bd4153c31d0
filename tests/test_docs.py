"""Tests that the Python of pages in docs/ runs, and that links lead somewhere."""

from __future__ import annotations

import re
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


@pytest.mark.quick
def test_links_between_pages_lead_somewhere() -> None:
    root = README.parent
    pages = [*root.glob("*.md"), *(root / "docs").glob("*.md")]
    anchors = {
        page: {_anchor(line) for line in page.read_text().splitlines() if line.startswith("#")} for page in pages
    }
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in link or link.startswith("mailto:"):
                continue
            name, _, anchor = link.partition("#")
            there = (page.parent / name).resolve() if name else page
            assert there.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors[there], f"{page.name}: {link}"


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower()).replace(" ", "-")
