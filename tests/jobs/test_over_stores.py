"""Whole jobs from and to each kind of store: the same bytes, and the same behaviour when something goes wrong."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import jobs.execution.unit
import jobs.orchestration.job
from jobs.execution.cluster import LocalCluster
from jobs.output.card_block import without_blocks
from jobs.output.leftovers import find_leftovers
from loaders.places import ROOT
from loaders.storage import open_store
from loaders.storage.address import Address
from tests.failing import fail_at
from tests.making import make_source, snapshot
from tests.shelf.places import OF_JOBS, Place, contents, fill

REPORT, PAGE = "weightmill.json", "report.html"
# presets, and what their outputs are: shards with an index; one file of many units; files written by offset; one pickle
PRESETS = {
    "nf4": (), "gguf_q8_0": (), "mlx_int4": ("output=packed",), "hqq4": (), "none": ("output.container=pytorch",)
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_source(tmp_path / "model")


@pytest.fixture(params=OF_JOBS)
def place(place_of: Callable[[str], Place], request: pytest.FixtureRequest) -> Place:
    """An empty place of some kinds."""
    return place_of(request.param)


def given(source: Address | Path, out: Address | Path, preset: str = "nf4") -> list[str]:
    arguments = (f"model.path={source}", "model.name=model", f"output.path={out}", "unit_mb=0.05")
    return [*arguments, f"quant={preset}", *PRESETS[preset]]


def comparable(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], Any]:
    """An output without its times and the place of its source, of which its card's blocks and its page tell as well."""
    report = json.loads(files[REPORT])
    del report["run"], report["source"]["path"], report["job"]["model"]["path"]
    said = {name: b"" if name == PAGE else without_blocks(data) for name, data in files.items() if name != REPORT}
    return said, report


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        *((preset, "shelf") for preset in PRESETS),
        ("nf4", "s3"), ("gguf_q8_0", "s3"), ("none", "s3"), ("gguf_q8_0", "az"), ("nf4", "gs"),
    ],
)  # fmt: skip
def test_the_output_is_the_same_wherever_both_lie(
    preset: str, kind: str, model: Path, tmp_path: Path, place_of: Callable[[str], Place], weightmill: Any
) -> None:
    assert weightmill("run", *given(model, tmp_path / "here", preset)).status == 0
    wanted = comparable(snapshot(tmp_path / "here"))
    for kinds in ((kind, kind), ("folder", kind), (kind, "folder")):
        source, target = (place_of(each) for each in kinds)
        out = target.address / "out"
        ran = weightmill("run", *given(fill(source, model, "model"), out, preset))
        assert ran.status == 0, ran.err
        assert comparable(contents(out)) == wanted
        assert find_leftovers(out.parent) == ()
        assert weightmill("verify", f"output.path={out}").status == 0


@pytest.mark.parametrize("preset", ["nf4", "gguf_q8_0", "mlx_int4"])
def test_an_interrupted_job_goes_on_where_it_was(
    preset: str, model: Path, place: Place, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weightmill("run", *given(model, place.address / "undisturbed", preset)).status == 0
    out = place.address / "out"

    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(ValueError, match="a bug"):
            weightmill("run", *given(model, out, preset), "cluster.units_at_once=1")
    [left] = find_leftovers(out.parent)
    assert left.units_done == 2
    assert weightmill("inspect", f"model.path={out}").status == 2  # there is no checkpoint
    again = weightmill("run", *given(model, out, preset), "format=json").document
    assert again["run"]["units_resumed"] == 2
    assert comparable(contents(out)) == comparable(contents(place.address / "undisturbed"))
    assert find_leftovers(out.parent) == ()


@pytest.mark.parametrize("when", ["complete", "publish"])
def test_interrupted_at_the_end(
    when: str, model: Path, place: Place, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place.address / "out"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"jobs.orchestration.job.{when}", stop)
        assert weightmill("run", *given(model, out)).status == 130
    again = weightmill("run", *given(model, out), "format=json").document
    assert again["run"]["units_resumed"] == again["run"]["units"]
    assert weightmill("verify", f"output.path={out}").status == 0


@pytest.mark.parametrize("kind", OF_JOBS[1:])
def test_units_are_made_by_other_processes(
    kind: str,
    model: Path,
    place_of: Callable[[str], Place],
    tmp_path: Path,
    weightmill: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a cluster: a task takes along addresses, not stores."""

    def elsewhere(task: Any, on_bytes: Any, stop: Any) -> Any:
        ran = subprocess.run(
            [sys.executable, "-m", "tests.shelf.worker"], input=pickle.dumps(task), cwd=ROOT, check=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return pickle.loads(ran.stdout)

    assert weightmill("run", *given(model, tmp_path / "here", "gguf_q8_0")).status == 0
    place = place_of(kind)
    monkeypatch.setattr(jobs.execution.unit, "run_unit", elsewhere)
    monkeypatch.setattr(LocalCluster, "is_local", False)
    out = place.address / "out"
    ran = weightmill("run", *given(fill(place, model, "model"), out, "gguf_q8_0"))
    assert ran.status == 0, ran.err
    assert comparable(contents(out)) == comparable(snapshot(tmp_path / "here"))


def test_a_source_that_changes_under_the_job_fails_it_by_name(
    model: Path, place: Place, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = fill(place, model, "model"), place.address / "out"
    honest, changed, one = jobs.execution.unit.run_unit, [], threading.Lock()

    def changing(task: Any, on_bytes: Any, stop: Any) -> Any:
        # Units run at once, and the server does not bear two writers of one object.
        with one:
            if not changed:
                name = task.unit.sources[-1].name
                data = bytearray((model / name).read_bytes())
                data[-1] ^= 1
                place.put(f"model/{name}", bytes(data))
                changed.append(name)
        return honest(task, on_bytes, stop)

    monkeypatch.setattr(jobs.execution.unit, "run_unit", changing)
    ran = weightmill("run", *given(source, out))
    assert ran.status == 1
    assert changed[0] in ran.err
    assert "it changed while it was read" in ran.err
    assert "Traceback" not in ran.err


def test_a_source_that_changes_when_all_units_are_done_is_not_published(
    model: Path, place: Place, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = fill(place, model, "model"), place.address / "out"
    honest, name = jobs.orchestration.job.make_report, next(model.glob("*.safetensors")).name

    def late(*arguments: Any) -> Any:
        data = bytearray((model / name).read_bytes())
        data[-1] ^= 1
        place.put(f"model/{name}", bytes(data))
        return honest(*arguments)

    monkeypatch.setattr(jobs.orchestration.job, "make_report", late)
    ran = weightmill("run", *given(source, out))
    assert ran.status == 1
    assert f"{name}: it changed while it was read" in ran.err
    assert open_store(out).absence() is not None


def test_an_output_is_replaced_only_when_asked(model: Path, place: Place, weightmill: Any) -> None:
    out = place.address / "out"
    assert weightmill("run", *given(model, out)).status == 0
    before = contents(out)
    ran = weightmill("run", *given(model, out), "format=json")
    assert (ran.status, ran.document["already"]) == (0, True)
    ran = weightmill("run", *given(model, out), "quant=fp4")
    assert ran.status == 2
    assert "exists, made by another request: quant was nf4, now fp4; output.overwrite=true replaces it" in ran.err
    assert contents(out) == before
    ran = weightmill("run", *given(model, out), "quant=ternary", "output.overwrite=true")
    assert ran.status == 0, ran.err
    assert json.loads(contents(out)[REPORT])["job"]["quant"]["kind"] == "ternary"
    assert weightmill("verify", f"output.path={out}").status == 0  # which finds files of others


def test_files_of_others_are_never_replaced(model: Path, place: Place, weightmill: Any) -> None:
    out = place.address / "out"
    assert weightmill("run", *given(model, out)).status == 0
    place.put("out/notes.txt", b"mine")
    ran = weightmill("run", *given(model, out), "quant=fp4", "output.overwrite=true")
    assert ran.status == 2
    assert "notes.txt" in ran.err
    assert contents(out)["notes.txt"] == b"mine"


def test_source_and_output_do_not_lie_in_one_another(model: Path, place: Place, weightmill: Any) -> None:
    source = fill(place, model, "model")
    ran = weightmill("run", *given(source, source / "out"))
    assert ran.status == 2
    assert "lie in one another" in ran.err


def test_a_flipped_bit_is_found(model: Path, place: Place, weightmill: Any) -> None:
    out = place.address / "out"
    assert weightmill("run", *given(model, out)).status == 0
    files = contents(out)
    name = next(name for name in sorted(files) if name.endswith(".safetensors"))
    data = bytearray(files[name])
    data[-1] ^= 1
    place.put(f"out/{name}", bytes(data))
    ran = weightmill("verify", f"output.path={out}", "format=json")
    assert ran.status == 1
    assert any(name in fault and "not those that were written" in fault for fault in ran.document["faults"])


def test_every_verb_reads_it(model: Path, place: Place, weightmill: Any, tmp_path: Path) -> None:
    source, outputs = fill(place, model, "model"), place.address / "outs"
    ran = weightmill("run", "-m", f"model.path={source}", f"output.root={outputs}", "quant=nf4,mlx_int4", "format=json")
    assert ran.status == 0, ran.err
    assert [job["output"] for job in ran.document["jobs"]] == [f"{outputs}/model-nf4", f"{outputs}/model-mlx_int4"]
    again = weightmill(
        "run", "-m", f"model.path={source}", f"output.root={outputs}", "quant=nf4,mlx_int4", "format=json"
    )
    assert "2 of them done before" in again.err
    assert weightmill("plan", f"model.path={source}", f"output.path={outputs}/other", "quant=hqq4").status == 0
    assert weightmill("inspect", f"model.path={source}", "format=json").document["path"] == str(source)
    assert weightmill("lint", f"output.path={outputs}/model-nf4").status == 0
    assert weightmill("recommend", f"model.path={source}").status == 0
    found = weightmill("diff", f"a={source}", f"b={outputs}/model-nf4", "format=json").document
    assert found["a"] == str(source)
    assert found["different"] > 0
    assert found["only_in_a"] == found["only_in_b"] == []
    compared = weightmill(
        "compare", f"runs=[{outputs}/model-nf4,{outputs}/model-mlx_int4]", f"output.root={tmp_path / 'o'}"
    )
    assert compared.status == 0, compared.err
    assert "model-mlx_int4" in compared.out


def test_what_interrupted_jobs_left_is_cleaned(
    model: Path, place: Place, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place.address / "out"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", stop)
        assert weightmill("run", *given(model, out)).status == 130
    listed = weightmill("clean", f"output.root={out.parent}", "format=json").document["found"]
    assert [row["status"] for row in listed] == ["abandoned"]
    if out.scheme == "s3":  # files that have their final names already are removed, and counted, too
        weights = [each.size for each in open_store(out).list() if each.name.endswith(".safetensors")]
        assert listed[0]["bytes"] > sum(weights) > 0
    assert find_leftovers(out.parent) != ()
    removed = weightmill("clean", f"output.path={out}", "delete=true", "format=json").document["found"]
    assert [row["status"] for row in removed] == ["removed"]
    assert find_leftovers(out.parent) == ()


def test_a_mix_is_measured_and_written(model: Path, place: Place, weightmill: Any) -> None:
    settings = ["quant=auto", "quant.engine=mlx", "quant.target_bits=5"]
    source = fill(place, model, "model")
    ran = weightmill(
        "run", f"model.path={source}", f"output.path={place.address / 'out'}", "output.root=here", *settings
    )
    assert ran.status == 0, ran.err
    assert weightmill("verify", f"output.path={place.address / 'out'}").status == 0


@pytest.mark.parametrize("kind", OF_JOBS[1:])
def test_what_needs_folders_is_refused_while_planning(
    kind: str, model: Path, place_of: Callable[[str], Place], weightmill: Any
) -> None:
    pytest.importorskip("transformers")
    place = place_of(kind)
    for source, out in ((model, place.address / "out"), (fill(place, model, "model"), model.parent / "out")):
        ran = weightmill("plan", *given(source, out), "verify=logits")
        assert ran.status == 2
        assert "verify=logits" in ran.err
        assert "the engine reads files of a folder" in ran.err
    ran = weightmill("run", *given(fill(place, model, "model"), model.parent / "out"), "strategy=lazy")
    assert ran.status == 2
    assert "is no folder of this machine" in ran.err
