"""The settings of clusters: what is refused, and where."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jobs.execution.choose import check_cluster
from jobs.execution.ray import offer
from jobs.execution.ray.offer import offered
from jobs.spec.cluster import ONLY_ON_RAY, ClusterSpec
from loaders.errors import BadSpec, StorageError
from tests.jobs.execution.ray.fake_machines import FakeRay, node

pytestmark = pytest.mark.quick
OTHER = {"units_per_node": 1, "retries": 0, "resources": {"nvme": 1}, "labels": {"zone": "a"}, "wait_s": 1}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_of_machines_is_refused_in_this_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert OTHER.keys() == ONLY_ON_RAY.keys()
    for kind in ("local", "auto"):
        with pytest.raises(BadSpec, match=rf"cluster\.{name}: it is of Ray's machines"):
            check_cluster(ClusterSpec(kind=kind, **{name: OTHER[name]}))
    check_cluster(ClusterSpec(kind="ray", **{name: OTHER[name]}))
    check_cluster(ClusterSpec(kind="local", read_limit_gbps=1))
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:6379")
    check_cluster(ClusterSpec(kind="auto", **{name: OTHER[name]}))


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"CPU": 1}, "expected custom resources, found CPU"),
        ({"nvme": 1.5}, "nvme: expected a whole number, or a part of 1, found 1.5"),
        ({"nvme": 0}, "nvme: expected a whole number, or a part of 1, found 0"),
    ],
)
def test_resources_are_custom_ones(resources: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClusterSpec(kind="ray", resources=resources)


def test_a_plan_says_which_machines_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(node("a", 16), node("b", 16), node("c", 2), node("d", 16, 0.5))
    closed: list[bool] = []
    ray.shutdown = lambda: closed.append(True)  # type: ignore[attr-defined]
    sent: list[ClusterSpec] = []

    def connect(spec: ClusterSpec, address: str, own: Any) -> Any:
        sent.append(spec)
        return ray

    monkeypatch.setattr(offer, "connect", connect)
    spec = ClusterSpec(kind="ray", units_per_node=3)
    lines = offered(spec, "1.2.3.4:6379", lambda threads: threads * 100_000_000, 0)
    assert lines == ["a and b: 2 units at once each, of 8 threads", "c: 1 unit at once, of 2 threads"]
    assert closed
    assert not sent[0].ship_code
    assert offered(spec, "1.2.3.4:6379", lambda threads: 10**12, 0) == ["no machine offers what a unit needs"]

    def refuses(*arguments: Any) -> Any:
        raise StorageError("nobody answers")

    monkeypatch.setattr(offer, "connect", refuses)
    assert offered(spec, "1.2.3.4:6379", lambda threads: 1, 0) == ["its machines are not known: nobody answers"]
    monkeypatch.setattr(offer, "socket", SimpleNamespace(gethostname=lambda: "here"))
    [line] = offered(spec, None, lambda threads: 1, 0)
    assert line.startswith("here: 1 unit at once, of ")


def test_a_cluster_may_have_gpus_that_this_machine_lacks(weightmill: Any) -> None:
    given = ("plan", "backend=cuda", "quant=nf4")
    here = weightmill(*given)
    if here.status == 0:
        pytest.skip("this machine has a GPU")
    assert here.status == 2
    ran = weightmill(*given, "cluster=ray", "cluster.address=127.0.0.1:9")
    assert ran.status == 0, ran.err
    assert "its machines are not known: cluster.address: nobody answers at 127.0.0.1:9" in ran.out.replace("\n", " ")
