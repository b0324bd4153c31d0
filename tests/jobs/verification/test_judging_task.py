"""verify=logits and verify=embeddings on a cluster: one task, with the numbers of this process."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.compose import compose, take_apart
from jobs.execution.cluster import LocalCluster, OnBytes, R_co, Report, Task, UnitFailed
from jobs.orchestration import source_pass
from jobs.orchestration.preflight import plan_job
from jobs.spec.job import JobSpec
from jobs.verification import judging_task
from loaders.backends.threads import Stopped
from loaders.errors import BadSpec
from tests.processes import start

pytest.importorskip("torch")
pytest.importorskip("transformers")
from loaders.models import runners

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LOGITS = ("quant=nf4", "verify=logits", "verify.tokens=320", "verify.window=32", "tracking=none")


class Elsewhere(LocalCluster):
    """A cluster that is not this process, as far as a job can tell: its tasks arrive by pickle."""

    is_local = False
    ran: list[str]
    most_bytes = 1 << 40

    def check(self, tasks: Sequence[Task[Report]]) -> None:
        if max(task.memory_bytes for task in tasks) > self.most_bytes:
            raise BadSpec("cluster: a unit needs more memory than the largest machine offers")

    def run(self, tasks: Sequence[Task[R_co]], on_bytes: OnBytes) -> Generator[R_co | UnitFailed]:
        sent: list[Task[R_co]] = [pickle.loads(pickle.dumps(task)) for task in tasks]
        for task in sent:
            task.reach()
        self.ran += [task.unit.id for task in sent]
        yield from super().run(sent, on_bytes)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    spec = compose("run", JobSpec, take_apart("run", JobSpec, LOGITS)).cluster
    cluster = Elsewhere(spec)
    cluster.ran = []
    for module in (source_pass, judging_task):
        monkeypatch.setattr(module, "choose", lambda spec: (cluster if spec.kind == "ray" else LocalCluster(spec), ""))
    return cluster


def test_the_numbers_are_those_of_this_process(weightmill: Any, tmp_path: Path, elsewhere: Elsewhere) -> None:
    mine, theirs = (
        weightmill("run", *LOGITS, f"output.path={tmp_path / kind}", f"cluster={kind}", "format=json")
        for kind in ("local", "ray")
    )
    assert (mine.status, theirs.status) == (0, 0), mine.err + theirs.err
    times = {"seconds": None, "reference_seconds": None}
    assert {**mine.document["quality"], **times} == {**theirs.document["quality"], **times}
    # Once before the units, to ask whether a machine could.
    assert elsewhere.ran == ["verify=logits", "unit-00001", "verify=logits"]
    assert "on one of the cluster's machines" in theirs.err
    elsewhere.ran.clear()
    judged = weightmill("verify", f"output.path={tmp_path / 'ray'}", *LOGITS[1:4], "cluster=ray", "format=json")
    assert judged.status == 0, judged.err
    assert elsewhere.ran[-1] == "verify=logits"


def test_nothing_begins_where_no_machine_could_judge(
    weightmill: Any, tmp_path: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("run", *LOGITS, f"output.path={tmp_path / 'out'}", "cluster=ray")
    elsewhere.most_bytes = 1 << 30
    short = weightmill(*given)
    assert short.status == 2
    assert "verify=logits: cluster: a unit needs more memory than the largest machine offers" in short.err
    elsewhere.most_bytes = 1 << 40
    monkeypatch.setattr(runners.Engine, "missing", ("bitsandbytes",))
    lacking = weightmill(*given)
    assert lacking.status == 2
    assert "running the original in transformers" in lacking.err
    assert elsewhere.ran == []
    assert not (tmp_path / "out").exists()


def test_a_cancelled_evaluation_stops_at_its_next_tokens(tmp_path: Path) -> None:
    spec = compose("run", JobSpec, take_apart("run", JobSpec, (*LOGITS, f"output.path={tmp_path / 'out'}")))
    planned = plan_job(spec)
    assert planned.judging is not None
    task = planned.judging.task(planned.plan.checkpoint.source.store, "out")  # the original stands for the output
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        task.run(lambda tokens: None, stop)


@pytest.mark.slow
def test_on_ray_the_numbers_are_those_of_this_process(weightmill: Any, tmp_path: Path) -> None:
    process = start("-m", "jobs.run", *LOGITS, f"output.path={tmp_path / 'ray'}", "cluster=ray", "format=json")
    said, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    theirs = json.loads(said)["quality"]
    mine = weightmill("run", *LOGITS, f"output.path={tmp_path / 'here'}", "format=json").document["quality"]
    times = {"seconds": None, "reference_seconds": None}
    assert {**mine, **times} == {**theirs, **times}
