"""`weightmill bench gpu`, on torch's CPU device: all of it is to work at the first try where there is a GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks.gpu import bytes as gpu_bytes
from jobs.benchmarks.gpu import jobs as gpu_jobs
from jobs.benchmarks.gpu import run as gpu
from jobs.benchmarks.gpu.jobs import Ran as Job
from jobs.benchmarks.gpu.trials import Bench, Found, Trial
from loaders.places import ROOT
from tests.conftest import Ran

SMALL = ("rows=64", "columns=4096", "repeats=1", "format=json")


@pytest.fixture(autouse=True)
def few_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WEIGHTS", 1 << 13), ("SEVERAL_RANGES", 1 << 14), ("REPEATS", 1)):
        monkeypatch.setattr(gpu_bytes, name, value)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    torch = pytest.importorskip("torch")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return str(request.param)


on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def rows(ran: Ran, part: str) -> dict[str, Any]:
    assert ran.status == 0, ran.err
    assert ran.document["status"] == "done"
    return {row["case"]: row for row in ran.document["rows"] if row["part"] == part}


@pytest.mark.engine
@on_devices
def test_bytes_and_speed(device: str, weightmill: Callable[..., Ran]) -> None:
    ran = weightmill("bench", "gpu", f"device={device}", "parts=[bytes,speed]", "minutes=60", *SMALL)
    found = rows(ran, "bytes")
    presets = gpu_bytes.device_presets()
    assert {"nf4", "ternary", "int8", "w4a16", "w8a16", "fp8_dynamic", "mlx_int4", "gguf_q8_0", "gguf_q4_0"} <= set(
        presets
    )
    for name in presets:
        for dtype in ("BF16", "F16", "F32"):
            row = found.pop(f"{name}, {dtype}")
            assert row["differing_cases"] == 0
            assert row["cases"] >= 6
            assert row["weights"] >= 1 << 15
    searched = gpu_bytes.searched_presets()
    assert {"hqq4", "gguf_q4_k_m", "gguf_q6_k"} <= set(searched)
    for name in searched:
        assert found.pop(f"{name}, error")["apart"] <= 1e-3
    assert [name for name in found if "bitsandbytes" not in name] == []
    found = rows(ran, "speed")
    assert all(row["gbps"] > 0 for name, row in found.items() if "bitsandbytes" not in name)
    for name in presets:
        assert {f"{name} on {where}, host to host, 1 thread" for where in (device, "the CPU")} <= set(found)
    for name in (*presets, *searched):
        wheres = (device, "the CPU")
        assert {f"{name} on {where}, encoded and measured, all threads" for where in wheres} <= set(found)
    for name in ("nf4", "fp8_dynamic", "gguf_q8_0"):
        assert f"{name} on {device} alone, all at once" in found
    assert "all bytes equal" in ran.err  # the table, and each row as soon as it was there


@pytest.mark.engine
def test_bytes_that_differ_are_a_fault_that_says_where(
    weightmill: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_device = pytest.importorskip("loaders.quantization.kernels.torch_device")
    right = torch_device.fourbit_codes

    def wrong(groups: Any, table: str) -> Any:
        codes, tops = right(groups, table)
        codes[3] ^= 1
        return codes, tops

    monkeypatch.setattr(torch_device, "fourbit_codes", wrong)
    monkeypatch.setattr(gpu_bytes, "device_presets", lambda: ["nf4"])
    ran = weightmill("bench", "gpu", "device=cpu", "parts=[bytes]", *SMALL)
    assert (ran.status, ran.document["status"]) == (1, "failed")
    faults = {row["case"]: row["fault"] for row in ran.document["rows"] if row["fault"]}
    assert set(faults) == {f"nf4, {dtype}" for dtype in ("BF16", "F16", "F32")}
    assert "nf4 group_size=64 double_quant=False, normal: 1 of 8192 bytes of weight" in faults["nf4, BF16"]


@pytest.mark.engine
@on_devices
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_loading_and_models(device: str, weightmill: Callable[..., Ran]) -> None:
    for name in ("transformers", "accelerate"):
        pytest.importorskip(name)
    demo = ROOT / "jobs" / "demo"
    ran = weightmill("bench", "gpu", f"device={device}", f"model.path={demo}", "parts=[loading,models]", *SMALL)
    found = rows(ran, "loading")
    for name in ("lazy", "read", "multithread", "streaming", "full", "auto"):
        assert found[f"strategy={name}"]["said"] == "all 29 weights right"
    assert {"safetensors' load_file", "quantize=nf4, backend=cpu"} <= set(found)
    found = rows(ran, "models")
    for name in ("full", "low_memory", "unified_memory", "streaming"):
        assert found[name]["error"] <= (0 if device == "cpu" else 0.02)
        assert found[name]["forward_s"] > 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_jobs_on_one_core_and_by_two_backends(
    source: Path, weightmill: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_jobs, "_warmed_up", lambda bench: Found())
    monkeypatch.setattr(gpu_jobs, "device_presets", lambda: ["nf4"])
    monkeypatch.setattr(gpu_jobs.os, "sched_getaffinity", partial(lambda found, pid: found, os.sched_getaffinity(0)))
    ran = weightmill("bench", "gpu", "device=cpu", f"model.path={source}", "parts=[jobs,cores]", *SMALL)
    assert rows(ran, "jobs")["nf4, backend=cpu"]["work_gbps"] > 0
    found = rows(ran, "cores")
    assert {"nf4 on 1 core", "hqq4 on 1 core"} <= set(found)
    if (both := found.get("nf4 on 2 cores")) is not None:
        assert both["ideal_gbps"] == pytest.approx(2 * found["nf4 on 1 core"]["work_gbps"])


def bench(tmp_path: Path, source: Path) -> Bench:
    return Bench(
        device="cuda",
        parts=("jobs",),
        path=str(source),
        gb=1,
        shape=(64, 4096),
        laps=1,
        work=tmp_path,
        ends=time.monotonic() + 60,
    )


@pytest.mark.parametrize(("hashes", "fault"), [({"a": "1"}, ""), ({"a": "2"}, "files differ from the CPU's: a")])
def test_outputs_of_both_backends_are_compared(
    hashes: dict[str, str], fault: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"cpu": Job(2.0, 1.0, {"a": "1"}), "cuda": Job(4.0, 3.0, hashes)}
    monkeypatch.setattr(gpu_jobs, "run_job", lambda source, bench, quant, backend: made[backend])
    _, *trials = gpu_jobs.whole_jobs(bench(tmp_path, source))
    found = {trial.name: trial.call() for trial in trials}
    assert found["nf4, backend=cpu"].fault == ""
    assert found["nf4, backend=cuda"].fault == fault
    assert "2.00 times the CPU's" in found["nf4, backend=cuda"].said


def test_a_trial_that_fails_is_a_row_and_the_rest_goes_on(
    weightmill: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: Bench) -> Iterator[Trial]:
        yield Trial("one", lambda: {}["nothing"])
        yield Trial("two", lambda: Found({"seconds": 1.5}, "well"))
        raise RuntimeError("no driver")

    parts = {"cores": broken, "jobs": lambda bench: iter([Trial("late", lambda: Found(said="well"))])}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "WITHOUT_GPU", tuple(parts))
    ran = weightmill("bench", "gpu", *SMALL)
    assert (ran.status, ran.document["faults"]) == (1, 2)
    assert [(row["case"], row["fault"]) for row in ran.document["rows"]] == [
        ("one", "KeyError: 'nothing'"), ("two", None), ("the rest of the part", "RuntimeError: no driver"),
        ("late", None),
    ]  # fmt: skip
    ran = weightmill("bench", "gpu", "minutes=1e-12", "parts=[jobs]", *SMALL)
    assert ran.status == 1
    assert ran.document["rows"][0]["fault"] == "left out: 1e-12 minutes were over"
    text = weightmill("bench", "gpu", "parts=[jobs]", "repeats=1")
    assert text.status == 0
    assert "all 1 trials went well" in text.out


@pytest.mark.skipif(sys.platform == "darwin", reason="there may be such a device")
def test_a_machine_without_the_device_says_so_in_a_line(weightmill: Callable[..., Ran]) -> None:
    ran = weightmill("bench", "gpu", "device=mps")
    assert ran.status == 1
    assert ran.err.startswith("weightmill: failed: device=mps: torch ")
    assert len(ran.err.splitlines()) == 1
    assert weightmill("bench", "gpu", "parts=[bites]").status == 2
