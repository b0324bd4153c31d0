"""What is said of a folder that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaders.storage.folder import Folder


@pytest.mark.quick
def test_the_name_that_was_meant_is_said(tmp_path: Path) -> None:
    for name in ("SmolLM2-Q4_1.gguf", "model"):
        (tmp_path / name).mkdir()
    for wrong, right in (("SmolLM2-Q4_1.ggu", "SmolLM2-Q4_1.gguf"), ("modelx", "model"), ("Model", "model")):
        assert Folder(tmp_path / wrong).absence() == f"nothing there; did you mean {tmp_path / right}?"
    assert Folder(tmp_path / "other").absence() == "nothing there"
    assert Folder(tmp_path / "none" / "other").absence() == f"nothing there, nor a folder {tmp_path / 'none'}"
