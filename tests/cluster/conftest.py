"""What the cluster's tests share: the model, Ray on three hosts, and the judge of how a job ended.

`python -m pytest -m cluster` runs them, `python -m tests.cluster.table` writes the table in docs/tested.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from loaders.places import ROOT
from tests.cluster import hosts
from tests.cluster.cluster import Cluster, Ended, Job, hashed, wait_for
from tests.cluster.model import SETTINGS, write_model
from tests.cluster.table import ROW, rows, table

HERE = Path(__file__).parent


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if found := rows(terminalreporter.stats):
        terminalreporter.write_sep("=", "clusters")
        terminalreporter.write_line(table(found))


@pytest.fixture(scope="session")
def _namespaces() -> None:
    if (lacks := hosts.missing()) is not None:
        pytest.skip(f"several hosts on one machine need {lacks}")
    pytest.importorskip("ray", reason="ray is not installed")


@pytest.fixture(scope="session")
def folder(_namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clusters")


class Model:
    """The checkpoint, and the output that an undisturbed job makes of it in one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_model(folder / "model")
        self._out = folder / "wanted" / "out"

    @cached_property
    def wanted(self) -> dict[str, Any]:
        ran = subprocess.run(
            [sys.executable, "-m", "jobs.run", f"model.path={self.folder}", f"output.path={self._out}", *SETTINGS,
             "tracking=none", "cluster=local"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        found = hashed(self._out.parent)
        shutil.rmtree(self._out.parent)
        return found


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    return Model(folder)


class Rack:
    """The cluster of three hosts that tests share; it is put up once, and repaired between tests."""

    def __init__(self, folder: Path, model: Model) -> None:
        self._folder, self._model = folder, model
        self._cluster: Cluster | None = None

    def up(self) -> Cluster:
        if self._cluster is None:
            self._cluster = Cluster(self._folder / "rack")
        else:
            self._cluster.repair()
        return self._cluster

    @cached_property
    def usual_s(self) -> float:
        """The seconds of an undisturbed job on the three hosts."""
        out = self._folder / "usual" / "out"
        ended = Job(self.up(), self._model.folder, out, *SETTINGS).end()
        assert ended.status == 0, ended.said
        shutil.rmtree(out.parent)
        return ended.seconds

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()


@pytest.fixture(scope="session")
def rack(folder: Path, model: Model) -> Iterator[Rack]:
    found = Rack(folder, model)
    try:
        yield found
    finally:
        found.close()


class Case:
    """One thing that happens to a job: starts jobs, judges how they ended, and keeps the table's row about it."""

    def __init__(self, name: str, rack: Rack, model: Model, folder: Path, record: Callable[[str, Any], None]) -> None:
        self.name, self.model, self.out = name, model.folder, folder / "out" / "out"
        self._rack, self._wanted, self._record = rack, model.wanted, record

    @cached_property
    def cluster(self) -> Cluster:
        """Three hosts, on which a job has run before: its kernels are compiled, its files are in the page cache."""
        assert self._rack.usual_s
        return self._rack.up()

    def job(self, *settings: str, **options: Any) -> Job:
        """Start the job; `options` are those of Job."""
        on, source = options.pop("on", None) or self.cluster, options.pop("source", self.model)
        return Job(on, source, options.pop("out", self.out), *SETTINGS, *settings, **options)

    def bytes_of(self, ended: Ended) -> str:
        return "same" if ended.outputs == self._wanted else "others" if ended.outputs else "none"

    def row(self, ended: Ended, remark: str = "") -> None:
        """Keep the table's row about this case."""
        added = f"{max(0.0, ended.seconds - self._rack.usual_s):.0f}" if ended.status == 0 else ""
        self._record(ROW, (self.name, str(ended.status), self.bytes_of(ended), added, remark))

    def is_done(self, job: Job, remark: str = "", *, status: int = 0, for_s: float = 200) -> Ended:
        """Wait for the job's end: it is done, its bytes are those of one process, and nothing else is left of it."""
        ended = job.end(for_s)
        self.row(ended, remark)
        assert ended.status == status, ended.said
        assert self.bytes_of(ended) == "same", ended.said
        assert ended.left == ()
        self.is_clean(job, ended)
        return ended

    def has_failed(self, job: Job, status: int, *says: str, remark: str = "", for_s: float = 200) -> Ended:
        """Wait for the job's end: it failed with a status, said why, and published nothing."""
        ended = job.end(for_s)
        self.row(ended, remark)
        assert ended.status == status, ended.said
        assert ended.outputs == {}
        for each in says:
            assert each in ended.said
        self.is_clean(job, ended)
        return ended

    def is_clean(self, job: Job, ended: Ended) -> None:
        """Check that what was printed is ours, and that no process works on."""
        assert ended.foreign == [], ended.said
        wait_for(lambda: not self._at_work(job), 15, f"processes are left: {self._at_work(job)}")

    def _at_work(self, job: Job) -> list[str]:
        return [
            f"{host.name}: {process.command}"
            for host, process in job.cluster.workers
            if not host.is_disturbed and any("weightmill" in path for path in process.opened)
        ]

    def resumes(self, job: Job, *settings: str, units: int = 1) -> Ended:
        """Run the job's command again: it goes on where it was, and is done."""
        finished = set(job.units)
        assert len(finished) >= units
        self.cluster.repair()
        again = self.job(*settings)
        ended = again.end(200)
        assert ended.status == 0, ended.said
        assert self.bytes_of(ended) == "same"
        assert ended.left == ()
        assert "units" in ended.said
        self.is_clean(again, ended)
        return ended


@pytest.fixture
def case(request: pytest.FixtureRequest, rack: Rack, model: Model, tmp_path: Path,
         record_property: Callable[[str, Any], None]) -> Iterator[Case]:  # fmt: skip
    """The case of a test, which is called what its docstring says, with its parameter."""
    said = str(request.function.__doc__).strip().rstrip(".")
    name = said.format(*([request.node.callspec.id] if hasattr(request.node, "callspec") else []))
    yield Case(name, rack, model, tmp_path, record_property)
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def clusters(folder: Path) -> Iterator[Callable[..., Cluster]]:
    """A function that puts up a cluster for one test alone."""
    made: list[Cluster] = []

    def make(**options: Any) -> Cluster:
        made.append(Cluster(folder / f"own{time.monotonic_ns()}", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
