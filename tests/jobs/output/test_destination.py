"""Where an output may go: what is there already, whose it is, and the room."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.making import (  # fmt: skip
    snapshot,
)


def test_overwriting_never_removes_what_weightmill_did_not_write(source: Path, tmp_path: Path, weightmill: Any) -> None:
    arguments = (f"model.path={source}", f"output.path={tmp_path / 'out'}")
    assert weightmill("run", *arguments).status == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    ran = weightmill("run", *arguments, "output.overwrite=true")
    assert ran.status == 2
    assert "notes.txt" in ran.err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert "notes.txt: weightmill did not write it" in weightmill("verify", f"output.path={tmp_path / 'out'}").out
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out' / 'inner'}")
    assert ran.status == 2
    assert "lies within another output" in ran.err


REPORT = "weightmill.json"


def test_nothing_is_left_in_the_users_folder(source: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'x' / 'out'}").status == 0
    assert list(Path.cwd().iterdir()) == []
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["out"]


def test_the_default_output_lies_in_a_folder_of_our_own_name(source: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={source}", "quant=fp4", "format=json")
    assert ran.document["output"] == str(Path.cwd() / "outputs" / "source-fp4")
    assert [p.name for p in Path.cwd().iterdir()] == ["outputs"]


@pytest.mark.quick
def test_an_existing_output_is_refused_and_untouched_unless_asked_to_replace(
    source: Path, tmp_path: Path, weightmill: Any
) -> None:
    out = tmp_path / "out"
    given = (f"model.path={source}", f"output.path={out}")
    assert weightmill("run", *given).status == 0
    before = snapshot(out)
    ran = weightmill("run", *given, "quant=fp4")
    assert ran.status == 2
    assert "output.overwrite=true replaces it" in ran.err
    assert snapshot(out) == before
    assert weightmill("run", *given, "quant=fp4", "output.overwrite=true").status == 0
    assert json.loads((out / REPORT).read_text())["job"]["quant"]["table"] == "fp4"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_only_outputs_of_our_own_are_ever_replaced(source: Path, tmp_path: Path, weightmill: Any) -> None:
    precious = tmp_path / "out" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("x")
    ran = weightmill("run", f"model.path={source}", f"output.path={precious.parent}", "output.overwrite=true")
    assert ran.status == 2
    assert "did not write" in ran.err
    assert precious.read_text() == "x"


@pytest.mark.parametrize("place", ["{source}", "{source}/out", "{source}/.."])
def test_an_output_in_or_around_its_source_is_refused(place: str, source: Path, weightmill: Any) -> None:
    ran = weightmill(
        "run", f"model.path={source}", f"output.path={place.format(source=source)}", "output.overwrite=true"
    )
    assert ran.status == 2
    assert "lie in one another" in ran.err


def test_an_unwritable_output_is_one_clear_error(source: Path, tmp_path: Path, weightmill: Any) -> None:
    (tmp_path / "file").write_text("x")
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'file' / 'out'}")
    assert ran.status == 1
    assert "Not a directory" in ran.err
    assert "Traceback" not in ran.err


def test_a_disk_without_room_is_found_before_the_work(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.orchestration.needs.free_bytes", lambda path: 1000)
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}")
    assert ran.status == 1
    assert "are free there" in ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "source"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_disk_that_fills_up_during_the_work_is_one_clear_error(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("loaders.containers.writer.allocate", full)
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}")
    assert ran.status == 1
    assert "No space left on device" in ran.err
    assert "the same command" in ran.err
    assert not (tmp_path / "out").exists()


def test_an_output_is_a_folder_and_not_a_file(source: Path, tmp_path: Path, weightmill: Any) -> None:
    given = (f"model.path={source}", "quant=nf4", f"output.path={tmp_path / 'x.GGUF'}")
    for verb in ("plan", "run"):
        ran = weightmill(verb, *given)
        assert ran.status == 2, ran.out
        assert f"give output.path={tmp_path / 'x'}, in which" in ran.err
    assert not list(tmp_path.glob("x*"))
    (tmp_path / "x.GGUF").mkdir()
    assert "expected a folder" not in weightmill("run", *given).err
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={source}", f"output.path={out}").status == 0
    [file, *_] = out.glob("*.safetensors")
    ran = weightmill("verify", str(file))
    assert ran.status == 2
    assert f"give its folder: {out}" in ran.err
