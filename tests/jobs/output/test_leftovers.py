"""jobs.clean: what interrupted jobs left behind, and nothing else."""

from __future__ import annotations

import re
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

    folder = tmp_path / "cwd" / "outputs"
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
    assert re.search(r"nothing was deleted; delete=true deletes \d+ B", listed.out)
    assert held.destination.root.exists()
    assert weightmill("clean", "delete=true").status == 0
    assert not held.destination.root.exists()
    assert "nothing abandoned" in weightmill("clean").out


def test_a_folder_given_alone_is_an_output_or_holds_outputs(tmp_path: Path, weightmill: Any) -> None:
    folder = tmp_path / "outs"
    (folder / "llama" / "deep").mkdir(parents=True)
    (folder / "llama" / "weights.safetensors").write_bytes(b"kept")
    nothing = weightmill("clean", str(folder))
    assert f"nothing abandoned in {folder} nor, of an output of that name, in {tmp_path}" in nothing.out
    journals = [tmp_path / ".outs.0123456789ab.weightmill", folder / ".llama.0123456789ab.weightmill"]
    other = tmp_path / ".other.0123456789ab.weightmill"
    for each in (*journals, other):
        each.mkdir()
    found = weightmill("clean", str(folder), "format=json").document["found"]
    assert [row["path"] for row in found] == [str(each) for each in journals]
    assert weightmill("clean", str(folder), "delete=true").status == 0
    assert not any(each.exists() for each in journals)
    assert other.exists()
    assert (folder / "llama" / "weights.safetensors").read_bytes() == b"kept"
    assert (folder / "llama" / "deep").exists()
