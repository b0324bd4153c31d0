"""Strategies and backends, as a job and `--help` offer them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jobs.orchestration.source_pass
import loaders.backends
from jobs.cli.compose import compose, take_apart
from jobs.execution.cluster import LocalCluster
from jobs.orchestration.preflight import plan_job
from jobs.orchestration.source_pass import units_for_gpus
from jobs.output.journal import Journal, Record
from jobs.spec.cluster import ClusterSpec
from jobs.spec.job import JobSpec
from jobs.spec.strategy import StrategySpec
from loaders.backends import fastest
from loaders.backends.fastest import Encoded
from loaders.places import CONF
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.strategies import LOADERS, settings_of
from tests.conftest import Ran
from tests.making import snapshot

QUICK = ("quant=nf4", "cluster=local")
NOT_FOR_JOBS = ("eager", "full", "unified_memory", "pinned", "low_memory", "fastsafetensors", "runai")


@pytest.mark.quick
def test_every_strategy_is_a_choice_with_all_its_settings() -> None:
    import yaml
    from pydantic import TypeAdapter

    found = {path.stem for path in (CONF / "strategy").glob("*.yaml")}
    assert found == set(LOADERS)
    for name, made in LOADERS.items():
        values = yaml.safe_load((CONF / "strategy" / f"{name}.yaml").read_text())
        assert set(values) == {"kind", *settings_of(made)}
        spec = TypeAdapter(StrategySpec).validate_json(json.dumps(values))
        assert spec.loader.name == name


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy=multithread", "strategy.max_workers=3", "strategy.min_file_size_per_worker=0.001"],
        ["strategy=streaming", "strategy.memory_budget_mb=16", "strategy.priority_weights=[layers.1]"],
        ["strategy=streaming", "strategy.prefetch_count=0"],
    ],
)
def test_a_job_gives_the_same_bytes_by_any_strategy(
    settings: list[str], weightmill: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    for name, given in (("one", ["strategy=lazy"]), ("other", settings)):
        ran = weightmill("run", *QUICK, f"model.path={source}", f"output.path={tmp_path / name}", *given)
        assert ran.status == 0, ran.err
    one, other = (snapshot(tmp_path / name, ignore=["weightmill.json"]) for name in ("one", "other"))
    assert one == other
    ran = weightmill("verify", f"output.path={tmp_path / 'other'}", settings[0])
    assert ran.status == 0, ran.err


@pytest.mark.parametrize("name", NOT_FOR_JOBS)
def test_a_strategy_that_cannot_serve_a_job_is_refused_in_one_line(
    name: str, weightmill: Callable[..., Ran], source: Path
) -> None:
    ran = weightmill("plan", *QUICK, f"model.path={source}", f"strategy={name}")
    assert ran.status == 2
    [line] = ran.err.strip().splitlines()
    assert f"strategy: {name} does not serve jobs: " in line
    assert "strategy=" in line.split("serve jobs")[1]


def test_settings_of_another_strategy_are_refused(weightmill: Callable[..., Ran], source: Path) -> None:
    ran = weightmill("plan", *QUICK, f"model.path={source}", "strategy=lazy", "strategy.memory_budget_mb=512")
    assert ran.status == 2
    assert "strategy.memory_budget_mb: unknown key; it belongs to strategy=remote|streaming" in ran.err
    ran = weightmill("plan", *QUICK, f"model.path={source}", "strategy=streaming", "strategy.memory_budget_mb=3")
    assert ran.status == 2
    assert "strategy.memory_budget_mb: expected at least 16; found 3" in ran.err


def test_units_with_weights_of_priority_run_first(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    run = LocalCluster.run

    def noted(self: Any, tasks: Any, on_bytes: Any) -> Any:
        made.extend(task.unit.tensors[0].name for task in tasks)
        return run(self, tasks, on_bytes)

    monkeypatch.setattr(LocalCluster, "run", noted)
    given = ("unit_mb=0.001", "strategy=streaming", "strategy.priority_weights=[model.layers.1,lm_head]")
    ran = weightmill("run", *QUICK, f"model.path={source}", f"output.path={tmp_path / 'out'}", *given)
    assert ran.status == 0, ran.err
    ranks = [0 if "layers.1." in name else 1 if "lm_head" in name else 2 for name in made]
    assert ranks == sorted(ranks)
    assert {0, 1, 2} <= set(ranks)


@pytest.mark.parametrize(
    ("quant", "has_gpu", "said"),
    [
        ("nf4", False, "there is no GPU here"),
        ("nf4", True, "so little is encoded before a GPU has started"),
        ("mlx_nvfp4", True, "no GPU stores the same bytes; backend=mlx asks for another"),
        ("hqq4", True, "on a GPU its search may find other codes; backend=cuda asks for them"),
    ],
)
def test_the_plan_says_why_auto_encodes_where_it_does(
    quant: str,
    has_gpu: bool,
    said: str,
    weightmill: Callable[..., Ran],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fastest, "may_have_gpu", lambda: has_gpu)
    ran = weightmill("plan", f"quant={quant}", f"model.path={source}", "backend=auto", "format=json")
    assert ran.status == 0, ran.err
    assert [note for note in ran.document["notes"] if note.startswith("encoded on ")] == [f"encoded on cpu: {said}"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast GPU, whose kernels are the CPU's, beside a slow CPU."""
    monkeypatch.setattr(fastest, "may_have_gpu", lambda: True)
    monkeypatch.setattr(fastest, "LEAST_BYTES", 0)
    monkeypatch.setattr(fastest, "START_S", 0)
    rates = {"cpu": Encoded(1.0, "same"), "cuda": Encoded(2.0, "same")}
    monkeypatch.setattr(fastest, "encoded", lambda backend, scheme, dtype, threads: rates[backend])
    for module in (loaders.backends, jobs.orchestration.source_pass):
        monkeypatch.setattr(module, "devices_of", lambda name: (name,))
    monkeypatch.setattr(loaders.backends, "kernels_of", lambda name: CpuKernels())


@pytest.mark.usefixtures("gpu")
def test_the_backend_that_auto_chose_is_reported_and_kept_in_records(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Record] = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, record: (records.append(record), add(self, record)))
    given = (f"model.path={source}", "backend=auto", f"output.path={tmp_path / 'out'}", "format=json")
    ran = weightmill("run", *QUICK, *given)
    assert ran.status == 0, ran.err
    assert ran.document["run"]["backend"] == "cuda"
    assert {record.backend for record in records} == {"cuda"}


@pytest.mark.usefixtures("gpu")
def test_jobs_of_a_sweep_share_one_reading_on_backends_of_their_own(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    given = (f"model.path={source}", "backend=auto", f"output.root={tmp_path / 'out'}", "format=json")
    ran = weightmill("run", "-m", "quant=nf4,hqq4", "cluster=local", *given)
    assert ran.status == 0, ran.err
    assert [job["run"]["backend"] for job in ran.document["jobs"]] == ["cuda", "cpu"]
    [read] = ran.document["passes"]
    assert read["bytes_read"] == read["source_bytes"]


def test_only_a_backend_that_may_store_other_bytes_is_another_job(
    weightmill: Callable[..., Ran], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders.backends, "kernels_of", lambda name: CpuKernels())
    keys = {}
    for backend in ("cpu", "cuda", "mps", "auto"):
        given = [*QUICK, f"model.path={source}", f"backend={backend}"]
        spec = compose("run", JobSpec, take_apart("run", JobSpec, given))
        keys[backend] = plan_job(spec).journal.key
    assert keys["cpu"] == keys["cuda"] == keys["auto"] != keys["mps"]


def test_more_units_run_at_once_where_there_are_several_gpus() -> None:
    spec = ClusterSpec(kind="local")
    assert units_for_gpus(spec, 4) >= 8
    assert units_for_gpus(spec, 0) >= 1


@pytest.mark.engine
@pytest.mark.parametrize("quant", ["mlx_int4", "mlx_nvfp4"])
def test_mlx_as_a_backend_gives_the_bytes_of_the_cpus_kernels(
    quant: str, weightmill: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mlx.core")
    for backend in ("cpu", "mlx"):
        given = (f"quant={quant}", f"backend={backend}", "cluster=local", f"output.path={tmp_path / backend}")
        ran = weightmill("run", f"model.path={source}", *given)
        assert ran.status == 0, ran.err
    one, other = (snapshot(tmp_path / backend, ignore=["weightmill.json"]) for backend in ("cpu", "mlx"))
    assert one == other
    ran = weightmill("plan", *QUICK, f"model.path={source}", "backend=mlx")
    assert ran.status == 2
    assert "backend: quant=nf4 runs on cpu, cuda, mps, not on mlx" in ran.err
