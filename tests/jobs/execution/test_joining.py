"""A file of several units on a cluster: machines copy the pieces and join them, and the driver reads none."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

import jobs.output.join
from jobs.execution.cluster import LocalCluster, OnBytes, R_co, Task, UnitFailed
from jobs.execution.joining import MOVES_AT_ONCE
from jobs.orchestration import source_pass
from tests.making import make_source, snapshot

REPORT = "weightmill.json"


class Elsewhere(LocalCluster):
    """A cluster that is not this process, as far as a job can tell: its tasks arrive by pickle, each of them twice."""

    is_local = False

    def run(self, tasks: Sequence[Task[R_co]], on_bytes: OnBytes) -> Generator[R_co | UnitFailed]:
        self.ran += [task.unit.id for task in tasks]
        sent = [pickle.loads(pickle.dumps(task)) for task in tasks]
        outcomes = list(super().run(sent, on_bytes))
        if sent[0].unit.id.startswith("joining"):
            self.late += sent
            for task in self.late:  # late attempts, of which the other one was first
                task.run(on_bytes, threading.Event())
        yield from outcomes

    late: list[Any]
    ran: list[str]


@pytest.mark.parametrize(("quant", "file"), [("gguf_q8_0", "model-Q8_0.gguf"), ("hqq4", "qmodel.pt")])
def test_machines_join_what_one_process_would_have_written(
    quant: str, file: str, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_source(tmp_path / "model")
    given = ("run", f"model.path={model}", "unit_mb=0.02", f"quant={quant}")
    assert weightmill(*given, f"output.path={tmp_path / 'here'}", "cluster=local").status == 0
    made: list[Elsewhere] = []

    def choose(spec: Any) -> Any:
        made.append(Elsewhere(spec))
        made[0].ran, made[0].late = [], []
        return made[0], ""

    readers = set()
    chunks = jobs.output.join._Joining.chunks

    def read(self: Any) -> Any:
        readers.add(threading.current_thread().name.partition("_")[0])
        return chunks(self)

    monkeypatch.setattr(source_pass, "choose", choose)
    monkeypatch.setattr(jobs.output.join._Joining, "chunks", read)
    ran = weightmill(*given, f"output.path={tmp_path / 'there'}", "cluster=ray")
    assert ran.status == 0, ran.err
    assert snapshot(tmp_path / "there", [REPORT]) == snapshot(tmp_path / "here", [REPORT])
    assert weightmill("verify", f"output.path={tmp_path / 'there'}").status == 0
    joins = [name for name in made[0].ran if name.startswith("joining")]
    units = len(made[0].ran) - len(joins)
    assert joins == [*(f"joining-{file}.{number}" for number in range(min(units, MOVES_AT_ONCE))), f"joining-{file}"]
    assert "unit" in readers
