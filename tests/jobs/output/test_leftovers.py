"""jobs.clean: what interrupted jobs left behind, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_cleaning_one_output_leaves_others_alone(tmp_path: Path, weightmill: Any) -> None:
    kept, gone = (tmp_path / f".{name}.0123456789ab.weightmill" for name in ("llama-3.1", "llama-3"))
    kept.mkdir()
    gone.mkdir()
    assert weightmill("clean", f"output.path={tmp_path / 'llama-3'}", "delete=true").status == 0
    assert kept.exists()
    assert not gone.exists()


@pytest.mark.quick
def test_clean_lists_and_removes_what_no_process_holds(source: Path, tmp_path: Path, weightmill: Any) -> None:
    from jobs.output.journal import Journal
    from loaders.storage.address import Address

    folder = tmp_path / "cwd" / "weightmill"
    held, left = Journal(Address.of(folder / "held"), "a" * 12), Journal(Address.of(folder / "left"), "b" * 12)
    with left.hold({}, overwrite=False):
        pass
    with held.hold({}, overwrite=False):
        found = weightmill("clean", "format=json").document["found"]
        assert [(Path(row["path"]), row["status"]) for row in found] == [
            (held.destination.root, "in use"),
            (left.destination.root, "abandoned"),
        ]
        found = weightmill("clean", "delete=true", "format=json").document["found"]
        assert [row["status"] for row in found] == ["in use", "removed"]
        assert held.destination.root.exists()
        assert not left.destination.root.exists()
    listed = weightmill("clean")
    assert listed.status == 0
    assert "nothing was deleted; delete=true deletes 64 B" in listed.out
    assert held.destination.root.exists()
    assert weightmill("clean", "delete=true").status == 0
    assert not held.destination.root.exists()
    assert "nothing abandoned" in weightmill("clean").out
