"""One file of several units: its pieces, made in place or apart, their join, and what interrupts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import jobs.output.join
import jobs.output.publish
from jobs.execution.cluster import LocalCluster
from loaders.storage import folder_destination
from tests.failing import fail_at
from tests.journals import find_journals
from tests.making import make_source, snapshot

REPORT = "weightmill.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_source(tmp_path / "model")


def arguments(model: Path, out: Path) -> list[str]:
    return [f"model.path={model}", f"output.path={out}", "unit_mb=0.02", "quant=gguf_q8_0"]


@pytest.mark.quick
def test_one_file_is_all_there_is(model: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    planned = weightmill("plan", *arguments(model, out), "format=json").document
    assert weightmill("run", *arguments(model, out)).status == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE",
        "README.md",
        "model-Q8_0.gguf",
        "report.html",
        REPORT,
    ]
    [file] = planned["output"]["files"]
    assert file["name"] == "model-Q8_0.gguf"
    assert file["bytes"] == (out / file["name"]).stat().st_size
    assert file["tensors"] == 21
    assert find_journals(tmp_path) == []
    report = json.loads((out / REPORT).read_text())
    assert len(report["files"][0]["pieces"]) == len(planned["units"]) > 2
    assert weightmill("verify", f"output.path={out}").status == 0


def test_the_units_do_not_change_the_tensors(model: Path, tmp_path: Path, weightmill: Any) -> None:
    found = []
    for unit_mb in (0.02, 0.05, 1000):
        out = tmp_path / f"out{unit_mb}"
        assert weightmill("run", *arguments(model, out), f"unit_mb={unit_mb}").status == 0
        found.append((out / "model-Q8_0.gguf").read_bytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("when", ["before the join", "within the join", "after the join"])
def test_an_interrupted_join_is_done_again_and_no_unit(
    when: str, model: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weightmill("run", *arguments(model, tmp_path / "undisturbed")).status == 0
    out = tmp_path / "out"

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("a bug")

    with monkeypatch.context() as patch:
        if when == "before the join":
            patch.setattr(jobs.output.publish, "join", fail)
        elif when == "within the join":
            patch.setattr("loaders.storage.folder_destination._put", fail)
        else:
            patch.setattr(jobs.output.publish, "_remove_others", fail)
        with pytest.raises(ValueError, match="a bug"):
            weightmill("run", *arguments(model, out))
    assert not out.exists()
    ran = weightmill("run", *arguments(model, out))
    assert ran.status == 0
    assert "units were done before" in ran.err
    assert snapshot(out, [REPORT]) == snapshot(tmp_path / "undisturbed", [REPORT])
    assert find_journals(tmp_path) == []


@pytest.mark.parametrize("first", ["apart", "in place"])
def test_pieces_made_apart_and_in_place_go_together(
    first: str, model: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ray's workers do some units, and this process the others."""
    assert weightmill("run", *arguments(model, tmp_path / "undisturbed")).status == 0
    out = tmp_path / "out"

    with monkeypatch.context() as patch:
        patch.setattr(LocalCluster, "is_local", first != "apart")
        fail_at(patch, 3)
        with pytest.raises(ValueError, match="a bug"):
            weightmill("run", *arguments(model, out), "cluster.units_at_once=1")
    [journal] = find_journals(tmp_path)
    pieces = sorted((journal / "pieces").iterdir())
    assert len(pieces) == (2 if first == "apart" else 0)
    if pieces:  # one that was damaged since is made again, in place, and does not come back
        data = bytearray(pieces[0].read_bytes())
        data[0] ^= 1
        pieces[0].write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(LocalCluster, "is_local", first == "apart")
        ran = weightmill("run", *arguments(model, out), "format=json").document["run"]["units_resumed"]
    assert ran == (1 if first == "apart" else 2)
    assert snapshot(out, [REPORT]) == snapshot(tmp_path / "undisturbed", [REPORT])


def test_pieces_go_into_the_file_one_by_one(
    model: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither twice on the disk, nor lost when the join is interrupted."""
    assert weightmill("run", *arguments(model, tmp_path / "undisturbed")).status == 0
    honest, left = folder_destination._move_in, []

    def watched(piece: Path, *rest: Any) -> None:
        if len(left) == 2:
            left.append(-1)
            raise ValueError("a bug")
        honest(piece, *rest)
        left.append(len(list(piece.parent.iterdir())))

    monkeypatch.setattr(LocalCluster, "is_local", False)
    monkeypatch.setattr(folder_destination, "_move_in", watched)
    given = (*arguments(model, tmp_path / "out"), "cluster.units_at_once=1")
    with pytest.raises(ValueError, match="a bug"):
        weightmill("run", *given)
    units = left[0] + 1
    ran = weightmill("run", *given, "format=json").document
    assert ran["run"]["units_resumed"] == units > 2
    # Those that are left are moved; then all are looked for, by the task that joins the file.
    assert left == [units - 1, units - 2, -1, *range(units - 3, -1, -1), *[0] * units]
    assert snapshot(tmp_path / "out", [REPORT]) == snapshot(tmp_path / "undisturbed", [REPORT])


def test_a_piece_that_changes_before_the_join_fails_the_run(
    model: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = jobs.output.publish.join

    def flipping(joined: Any, pieces: Any, journal: Any, records: Any) -> Any:
        name, start, _ = journal.find(pieces[0])
        path = journal.destination.root / name
        data = bytearray(path.read_bytes())
        data[start + 100] ^= 1
        path.write_bytes(data)
        return honest(joined, pieces, journal, records)

    monkeypatch.setattr(jobs.output.publish, "join", flipping)
    ran = weightmill("run", *arguments(model, tmp_path / "out"))
    assert ran.status != 0
    assert "it is not what was written" in ran.err
    monkeypatch.undo()
    assert weightmill("run", *arguments(model, tmp_path / "out")).status == 0  # that unit is done again
