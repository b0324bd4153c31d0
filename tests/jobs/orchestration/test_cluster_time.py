"""plan cluster.nodes=: how long so many machines take, by rates that are measured here, given or assumed."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.orchestration import cluster_time
from loaders.backends.fastest import Encoded

pytestmark = pytest.mark.quick

START_S = cluster_time.START_S + cluster_time.WORKER_CPU_S
NODE = "cluster.node={cpus: 8, read_gbps: 2, write_gbps: 1}"


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_time, "encoded", lambda *given: Encoded(2e9, "", cpu_rate=1e6))
    monkeypatch.setattr(cluster_time, "_moving", lambda: (4e9, 8e9, 16e9))


def test_time_bytes_and_what_binds_are_in_the_plan_and_its_document(weightmill: Any) -> None:
    given = ("plan", "quant=nf4", "unit_mb=0.5", "cluster.nodes=2", NODE)
    found = weightmill(*given, "format=json").document["cluster"]
    assert (found["nodes"], found["threads"], found["units_per_node"], found["units_at_once"]) == (2, 8, 1, 2)
    assert found["read_bytes"] == 3_870_208  # the demo, encoded at 1 MB/s by each of 16 CPUs
    assert found["seconds_of"]["cpu"] == pytest.approx(3.870208 / 16, rel=0.01)
    assert found["read_bytes_of_a_node"]["least"] + found["read_bytes_of_a_node"]["most"] == found["read_bytes"]
    assert found["seconds"] == pytest.approx(START_S + cluster_time.END_S + 1, abs=1)
    taken = {rate["what"]: rate["from"] for rate in found["rates"]}
    assert taken["a CPU encodes BF16 as nf4"] == "measured here"
    assert taken["a machine reads"] == "given"
    assert taken["Ray is joined"] == "assumed"
    said = " ".join(weightmill(*given).out.split())
    assert f"on 2 machines: about {found['seconds']:.0f} s; {found['units']} units, 2 at once" in said
    assert "what binds: the start" in said
    assert "cluster" not in weightmill("plan", "quant=nf4", "format=json").document


def test_what_is_not_given_is_assumed_and_said(weightmill: Any) -> None:
    found = weightmill("plan", "quant=nf4", "cluster.nodes=3", "format=json").document["cluster"]
    taken = {rate["what"]: (rate["value"], rate["from"]) for rate in found["rates"]}
    assert taken["a machine writes"] == (1.0, "assumed")
    assert taken["CPUs of a machine"][1] == "measured here"


def test_a_file_that_units_share_is_joined_at_the_end(weightmill: Any) -> None:
    def end_s(quant: str) -> float:
        node = "cluster.node={read_gbps: 0.001, write_gbps: 0.001}"
        document = weightmill("plan", f"quant={quant}", "cluster.nodes=2", node, "format=json").document
        return float(document["cluster"]["seconds_of"]["end"])

    assert end_s("nf4") == cluster_time.END_S
    assert (
        end_s("gguf_q8_0") > cluster_time.END_S + 3
    )  # 2 MB at 1 MB/s: a half of it each is read and written by two, then one reads it


def test_limits_of_the_settings_bind_here_too(weightmill: Any) -> None:
    def found(*given: str) -> Any:
        node = "cluster.node={cpus: 32, read_gbps: 2}"
        return weightmill("plan", "cluster=ray", "cluster.nodes=2", node, *given, "format=json").document["cluster"]

    free = found()
    assert free["units_per_node"] == 4
    assert found("cluster.units_per_node=3")["units_per_node"] == 3
    assert found("cluster.units_at_once=2")["units_per_node"] == 1
    slow = found("cluster.read_limit_gbps=0.4")["seconds_of"]["reading"]
    assert slow == pytest.approx(10 * free["seconds_of"]["reading"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("plan", NODE), "cluster: node is what each of nodes has; give nodes as well, such as nodes=8"),
        (("plan", "cluster.nodes=0"), "cluster.nodes: expected at least 1"),
        (("plan", "cluster.nodes=2", "cluster.node={memory_gb: 0.1}"), "GB of memory, which such a machine has not"),
        (("run", "cluster.nodes=2"), "cluster.nodes: unknown key; it is for plan, which says how long such machines"),
        (("run", NODE), "cluster.node: unknown key; it is for plan"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(weightmill: Any, given: tuple[str, ...], said: str) -> None:
    ran = weightmill(*given)
    assert ran.status == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1
