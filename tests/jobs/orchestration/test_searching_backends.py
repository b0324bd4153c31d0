"""Searches on a GPU, which may find other codes than on the CPU, never mix with the CPU's. The GPU is torch's CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jobs.orchestration.source_pass
import loaders.backends
from jobs.cli.compose import compose, take_apart
from jobs.orchestration.preflight import plan_job
from jobs.spec.job import JobSpec
from loaders.backends import encoded_on, fastest, offered
from loaders.backends.fastest import Encoded
from loaders.places import DEMO
from loaders.quantization.schemes.ggml import Ggml
from loaders.quantization.schemes.hqq import Hqq
from tests.conftest import Ran
from tests.journals import find_journals

pytestmark = pytest.mark.engine
HQQ = ("quant=hqq4", "cluster=local", "unit_mb=0.02", "cluster.units_at_once=1")


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is torch's CPU device, fast beside the CPU's kernels."""
    pytest.importorskip("torch")
    from loaders.quantization.kernels.torch_device import DeviceKernels

    kernels_of = loaders.backends.kernels_of
    monkeypatch.setattr(
        loaders.backends, "kernels_of", lambda name: DeviceKernels("cpu") if name == "cuda" else kernels_of(name)
    )
    for module in (loaders.backends, jobs.orchestration.source_pass):
        monkeypatch.setattr(module, "devices_of", lambda name: (name,))
    monkeypatch.setattr(fastest, "may_have_gpu", lambda: True)
    monkeypatch.setattr(fastest, "LEAST_BYTES", 0)
    monkeypatch.setattr(fastest, "START_S", 0)
    rates = {"cpu": Encoded(1.0, "same"), "cuda": Encoded(2.0, "same")}
    monkeypatch.setattr(fastest, "encoded", lambda backend, scheme, dtype, threads: rates[backend])


def backends_of(out: Path) -> dict[str, set[str]]:
    """The backends that the report names, of the tensors that were quantized and of the others."""
    found: dict[str, set[str]] = {"quantize": set(), "others": set()}
    for tensor in json.loads((out / "weightmill.json").read_text())["tensors"]:
        found[tensor["action"] if tensor["action"] == "quantize" else "others"].add(tensor["backend"])
    return found


def test_the_report_names_the_backend_of_each_tensor(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    for backend, wanted in (("cuda", "cuda"), ("cpu", "cpu"), ("auto", "cpu")):
        out = tmp_path / backend
        ran = weightmill("run", *HQQ, f"model.path={source}", f"output.path={out}", f"backend={backend}")
        assert ran.status == 0, ran.err
        assert backends_of(out) == {"quantize": {wanted}, "others": {"cpu"}}


@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "auto")])
def test_a_job_on_another_backend_takes_nothing_from_an_interrupted_one(
    first: str, then: str, weightmill: Callable[..., Ran], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = (*HQQ, f"model.path={source}", f"output.path={out}", "format=json")

    def no(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", no)
        assert weightmill("run", *given, f"backend={first}").status == 130
    ran = weightmill("run", *given, f"backend={then}")
    assert ran.status == 0, ran.err
    assert ran.document["run"]["units_resumed"] == 0
    assert backends_of(out)["quantize"] == {"cuda" if then == "cuda" else "cpu"}
    assert len(find_journals(tmp_path)) == 1  # the interrupted job's own


def test_a_job_on_the_same_backend_goes_on(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*HQQ, f"model.path={source}", f"output.path={tmp_path / 'out'}", "format=json", "backend=cuda")

    def no(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", no)
        assert weightmill("run", *given).status == 130
    ran = weightmill("run", *given)
    assert ran.document["run"]["units_resumed"] == ran.document["run"]["units"]
    assert backends_of(tmp_path / "out")["quantize"] == {"cuda"}


def test_each_job_of_a_sweep_has_a_backend_of_its_own(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    given = (f"model.path={source}", f"output.root={tmp_path / 'out'}", "format=json")
    ran = weightmill("run", "-m", *HQQ, "backend=cpu,cuda", *given)
    assert ran.status == 0, ran.err
    outs = [Path(job["output"]) for job in ran.document["jobs"]]
    assert [backends_of(out)["quantize"] for out in outs] == [{"cpu"}, {"cuda"}]


@pytest.mark.parametrize(
    ("quant", "is_other"),
    [("nf4", False), ("w4a16", False), ("gguf_q8_0", False), ("hqq4", True), ("gguf_q4_k_m", True)],
)
def test_only_a_search_on_a_gpu_is_another_job(quant: str, is_other: bool) -> None:
    keys = {}
    for backend in ("cpu", "cuda", "auto"):
        given = [f"quant={quant}", "cluster=local", f"model.path={DEMO}", f"backend={backend}"]
        keys[backend] = plan_job(compose("run", JobSpec, take_apart("run", JobSpec, given))).journal.key
    assert keys["cpu"] == keys["auto"]
    assert (keys["cpu"] != keys["cuda"]) is is_other


def by_type(out: Path) -> dict[str, set[str]]:
    """The backends that the report names, by the type of what was stored."""
    found: dict[str, set[str]] = {}
    for tensor in json.loads((out / "weightmill.json").read_text())["tensors"]:
        for part in tensor["stored"].values():
            found.setdefault(part["dtype"], set()).add(tensor["backend"])
    return found


@pytest.mark.parametrize(
    ("quant", "backend", "wanted"),
    [
        ("gguf_q4_k_m", "cuda", {"Q4_K": "cuda", "Q6_K": "cuda"}),
        ("gguf_q4_k_m", "auto", {"Q4_K": "cpu", "Q6_K": "cpu"}),
        ("gguf_q4_0", "cuda", {"Q4_0": "cuda", "Q6_K": "cuda"}),
        ("gguf_q4_0", "auto", {"Q4_0": "cuda", "Q6_K": "cpu"}),
    ],
)
def test_a_mix_searches_on_the_gpu_only_if_that_was_asked_for(
    quant: str, backend: str, wanted: dict[str, str], weightmill: Callable[..., Ran], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = (f"quant={quant}", "cluster=local", f"model.path={DEMO}", f"output.path={out}", f"backend={backend}")
    ran = weightmill("run", *given)
    assert ran.status == 0, ran.err
    found = by_type(out)
    assert {kind: found[kind] for kind in wanted} == {kind: {name} for kind, name in wanted.items()}


def test_a_gpu_searches_only_where_it_was_asked_for() -> None:
    for scheme in (Hqq(4), Ggml("Q6_K")):
        assert "cuda" in offered(scheme)
        assert encoded_on(scheme, "cuda", searches=True) == "cuda"
        assert encoded_on(scheme, "cuda", searches=False) == "cpu"
    assert encoded_on(Ggml("Q8_0"), "cuda", searches=False) == "cuda"
    assert encoded_on(Ggml("Q3_K"), "cuda", searches=True) == "cpu"
