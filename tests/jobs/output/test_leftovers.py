"""jobs.clean: what interrupted jobs left behind, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_cleaning_one_output_leaves_others_alone(tmp_path: Path, weightmill: Any) -> None:
    kept, gone = (tmp_path / f".{name}.0123456789ab.weightmill" for name in ("llama-3.1", "llama-3"))
    kept.mkdir()
    gone.mkdir()
    assert weightmill("clean", f"output.path={tmp_path / 'llama-3'}").status == 0
    assert kept.exists()
    assert not gone.exists()


def test_clean_lists_and_removes_what_no_process_holds(source: Path, tmp_path: Path, weightmill: Any) -> None:
    from jobs.output.journal import Journal

    folder = tmp_path / "cwd" / "weightmill"
    held, left = Journal(folder / "held", "a" * 12), Journal(folder / "left", "b" * 12)
    with left.hold({}):
        pass
    with held.hold({}):
        found = weightmill("clean", "dry_run=true", "format=json").document["found"]
        assert [(Path(row["path"]), row["status"]) for row in found] == [
            (held.root, "in use"),
            (left.root, "abandoned"),
        ]
        found = weightmill("clean", "format=json").document["found"]
        assert [row["status"] for row in found] == ["in use", "removed"]
        assert held.root.exists()
        assert not left.root.exists()
    assert weightmill("clean").status == 0
    assert "nothing abandoned" in weightmill("clean").out
