"""`python -m jobs.bench job`: whole commands beside copying and other tools, their phases, and more and more cores."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.benchmarks.job.cores import copied
from jobs.benchmarks.job.phases import IMPORTS, NAMES, OTHER, PHASES, UNITS, WORK, stacks_of
from jobs.benchmarks.job.profile import KINDS, RATE, Samples, entries_of, most_by_cores, py_spy, rows_of
from loaders.errors import BadSpec
from loaders.places import ROOT
from tests.conftest import Ran

LIB = "/usr/lib/python3.11"
MAIN = f"thread (11): MainThread;<module> ({ROOT}/jobs/run.py:1);run_job ({ROOT}/jobs/orchestration/source_pass.py:9)"
POOL = f"thread (12): unit_0;_worker ({LIB}/concurrent/futures/thread.py:83)"
SITE = f"{ROOT}/.venv/lib/python3.11/site-packages"


@pytest.mark.quick
def test_every_phase_names_files_that_are_there() -> None:
    ours = [place for _, place, _ in PHASES if place.startswith(("jobs/", "loaders/"))]
    assert ours == [place for place in ours if (ROOT / place).exists()]
    assert set(WORK) < set(NAMES)


@pytest.mark.parametrize(
    ("stack", "phase", "waits"),
    [
        (f"{MAIN};wait ({LIB}/threading.py:320)", OTHER, True),
        (f"{MAIN};run ({ROOT}/jobs/execution/cluster.py:9);wait ({LIB}/threading.py:320)", UNITS, True),
        (f"{MAIN};lint_at ({ROOT}/loaders/lint/__init__.py:9);read ({LIB}/pathlib.py:9)", "lint", False),
        (f"{MAIN};_find_and_load (<frozen importlib._bootstrap>:9)", IMPORTS, False),
        (
            f"{MAIN};plots ({ROOT}/jobs/report/plots.py:9);_find_and_load (<frozen importlib._bootstrap>)",
            "report",
            False,
        ),
        (f"{POOL};_call ({SITE}/numba/core/dispatcher.py:9)", "start: kernels loaded", False),
        (f"{POOL};Bnb4.encode.<locals>.encode_range ({ROOT}/loaders/quantization/schemes/hqq.py:9)", "encode", False),
        (f"{POOL};Bnb4.decode ({ROOT}/loaders/quantization/schemes/hqq.py:9)", "measure", False),
        (f"{POOL};ShardWriter.read ({ROOT}/loaders/containers/writer.py:9)", "read back", False),
        (f"{POOL};ShardWriter.seal ({ROOT}/loaders/containers/writer.py:9)", "write: sync", False),
    ],
)
def test_a_sample_belongs_to_a_phase(stack: str, phase: str, waits: bool) -> None:
    [found] = stacks_of(f'process 11:"python -m jobs.run";{stack} 3\n')
    assert (found.process, found.phase, found.is_waiting, found.samples) == ("11", phase, waits, 3)


def test_phases_add_up_and_waiting_for_units_is_shared_out() -> None:
    lead, unit = f"process 11:x;{MAIN}", f"process 11:x;{POOL}"
    encode = f"{unit};encode ({ROOT}/loaders/quantization/schemes/hqq.py:9)"
    lines = [
        f"{lead};lint_at ({ROOT}/loaders/lint/__init__.py:9) 100",
        f"{lead};run ({ROOT}/jobs/execution/cluster.py:9);wait ({LIB}/threading.py:320) 300",
        f"{encode} 200",
        f"{unit};ShardWriter._put ({ROOT}/loaders/containers/writer.py:9) 100",
    ]
    kinds = {"all": lines, "running": [lines[0], lines[2]], "holding": [lines[0], f"{encode} 40"]}
    samples = {kind: Samples(stacks_of("\n".join(kinds[kind])), 400 / RATE) for kind in KINDS}
    rows = {row["phase"]: row for row in rows_of(samples, 8.0, 6.0)}
    assert sum(row["wall_s"] for row in rows.values()) == pytest.approx(8.0)
    assert sum(row["cpu_s"] for row in rows.values()) == pytest.approx(6.0)
    assert [rows[phase]["wall_s"] for phase in ("lint", "encode", "write", UNITS)] == pytest.approx([2, 4, 2, 0])
    assert [rows[phase]["cpu_s"] for phase in ("lint", "encode", "write")] == pytest.approx([2, 4, 0])
    assert rows["encode"]["lock_share"] == pytest.approx(0.1)
    assert rows["write"]["blocked_s"] == pytest.approx(2)
    assert rows[UNITS]["waiting_s"] == pytest.approx(6)
    most = {row["cores"]: row for row in most_by_cores(list(rows.values()), 2.0)}
    # 4 s of CPU for 2 GB of work, 0.8 s of them with the lock held, and 2 s of lint.
    assert [most[cores]["work_gbps"] for cores in (1, 4, 8, 128)] == pytest.approx([0.5, 2, 2.5, 2.5])
    assert most[128]["command_gbps"] == pytest.approx(2 / 2.8)


def test_perf_says_what_the_kernel_did() -> None:
    said = "# Overhead  Samples  Parent symbol\n    82.54%   331  [other]   \n     3.99%    16  asm_exc_page_fault \n\n"
    assert entries_of(said) == {"[other]": 331, "asm_exc_page_fault": 16}


def test_jobs_are_timed_beside_copying_and_what_is_not_there_is_said(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    given = (
        f"path={source}",
        "quants=[nf4,fp8_dynamic]",
        "sweep=[nf4,fp8_dynamic]",
        "cold=true",
        "repeats=1",
        "format=json",
    )
    peer = f"peer='{sys.executable} -c pass {{source}} {{output}}'"
    ran = weightmill("bench", "job", *given, peer, "llmcompressor=absent", f"folder={tmp_path}")
    assert ran.status == 0, ran.err
    rows = {row["case"]: row for row in ran.document["rows"]}
    missing = {name: row["missing"] for name, row in rows.items() if row["missing"]}
    name = "llm-compressor model_free_ptq, FP8_DYNAMIC"
    assert list(missing) == [name, f"{name}, a worker a core"]
    assert all("there is no" in why for why in missing.values())
    names = ("weightmill nf4", "weightmill fp8_dynamic", "weightmill, a sweep: nf4, fp8_dynamic")
    for name in (*names, "weightmill nf4, cold"):
        assert 0 < rows[name]["start_s"] < rows[name]["median_s"], name
        assert rows[name]["cpu_s"] > 0
    assert all(rows[name]["times_faster"] > 0 for name in names)
    assert rows["weightmill nf4, cold"]["of_the_best_read"] > 0
    assert sum(name.startswith("peer: ") for name in rows) == 1
    assert not list(tmp_path.glob("weightmill-bench-*"))
    one = weightmill("bench", "job", f"path={source}", "peer=cp")
    assert one.status == 2
    assert "{source} and {output}" in one.err


@pytest.mark.engine
def test_an_engines_own_tool_is_timed_with_its_imports_apart(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    pytest.importorskip("hqq")
    ran = weightmill("bench", "job", f"path={source}", "quant=hqq4", "repeats=1", "format=json", f"folder={tmp_path}")
    assert ran.status == 0, ran.err
    row = next(row for row in ran.document["rows"] if row["case"] == "hqq, 4 bits")
    assert not row["missing"]
    assert 0 < row["start_s"] < row["median_s"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux chooses the cores of a process")
def test_a_job_is_timed_on_more_and_more_cores(weightmill: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    given = (f"path={source}", "cores=[1,2,4096]", f"folder={tmp_path}", f"output.root={tmp_path}", "format=json")
    ran = weightmill("bench", "job", *given)
    assert ran.status == 0, ran.err
    assert ran.document["not_run"][-1] == 4096
    first = ran.document["rows"][0]
    assert (first["quant"], first["cores"]) == ("nf4", 1)
    assert first["kernels_gbps"] > 0
    assert first["ideal_gbps"] == first["work_gbps"] > first["command_gbps"]
    assert Path(ran.document["plot"]).stat().st_size > 0
    none = weightmill("bench", "job", f"path={source}", "cores=[4096]")
    assert none.status == 2
    assert "are usable here" in none.err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux copies ranges between files")
def test_a_parallel_copy_has_the_same_bytes(source: Path, tmp_path: Path) -> None:
    files = sorted(source.glob("*.safetensors"))
    assert copied(files, tmp_path / "copy", 2) > 0
    assert all((tmp_path / "copy" / file.name).read_bytes() == file.read_bytes() for file in files)


def test_a_job_is_profiled_by_phases(weightmill: Callable[..., Ran], source: Path, tmp_path: Path) -> None:
    try:
        py_spy()
    except BadSpec as error:
        pytest.skip(str(error))
    ran = weightmill(
        "bench", "job", f"path={source}", "profile=true", "tracking=none", f"folder={tmp_path}", "format=json"
    )
    assert ran.status == 0, ran.err
    found = ran.document
    assert [row["phase"] for row in found["rows"]] == [*NAMES, OTHER]
    assert sum(row["cpu_s"] for row in found["rows"]) == pytest.approx(found["cpu_s"])
    assert sum(row["wall_s"] for row in found["rows"]) == pytest.approx(found["wall_s"])
    assert next(row for row in found["rows"] if row["phase"] == IMPORTS)["cpu_s"] > 0
    assert found["kernel_missing"] or found["kernel_cpu_s"]
    assert not list(tmp_path.glob("weightmill-bench-*"))


def test_without_py_spy_the_profile_says_how_to_get_it(
    weightmill: Callable[..., Ran], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    ran = weightmill("bench", "job", f"path={source}", "profile=true")
    assert ran.status == 2
    assert "pip install 'weightmill[bench]'" in ran.err
