"""Jobs whose source lies in a store that is not local: what they fetch, and what they hold of it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.storage.address import Address
from loaders.storage.base import Range
from loaders.storage.objects.destination import ObjectDestination
from loaders.strategies import remote
from loaders.strategies.reading import fetching, segments, sparse_memory
from tests import sources
from tests.failing import at_first_unit
from tests.making import Raw, write_checkpoint
from tests.proxy import Proxy
from tests.shelf.places import ObjectPlace, ShelfPlace, fill


@pytest.fixture
def proxy(shelves: Address) -> Iterator[Proxy]:
    with Proxy(f"http://{urlsplit(shelves.text).netloc}") as made:
        yield made


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Requests of at most 8 KiB, so that small tensors are fetched as large ones are."""
    for module in (sparse_memory, segments, fetching):
        monkeypatch.setattr(module, "PAGE", 4096)
    monkeypatch.setattr(fetching, "SEGMENT", 8192)
    fetching.fetcher.cache_clear()
    yield
    fetching.fetcher.cache_clear()


def through(proxy: Proxy, shelves: Address, folder: Path, tmp_path: Path) -> Address:
    """Put a model on the server; returns its address through the proxy."""
    place = fill(ShelfPlace(shelves / tmp_path.name), folder, "model")
    return Address.of(place.text.replace(urlsplit(place.text).netloc, proxy.host))


def fetched(proxy: Proxy, model: Path) -> dict[str, list[Range]]:
    """The ranges of each weight file that were fetched, in order."""
    found: dict[str, list[Range]] = {}
    names = {entry.name for entry in open_checkpoint(model).files}
    for seen in proxy.seen:
        name = urlsplit(seen.target).path.split("/model/")[-1]
        if seen.method == "GET" and seen.range is not None and name in names:
            start, stop = seen.range.removeprefix("bytes=").split("-")
            found.setdefault(name, []).append((int(start), int(stop) + 1))
    return {name: sorted(ranges) for name, ranges in found.items()}


def check_once(proxy: Proxy, model: Path) -> None:
    """Check that every stored byte was fetched, and none twice."""
    found = fetched(proxy, model)
    for ranges in found.values():
        twice = [(one, other) for one, other in pairwise(ranges) if one[1] > other[0]]
        assert not twice
    for spec in open_checkpoint(model).weights:
        inside = [(max(a, spec.offset), min(b, spec.offset + spec.size)) for a, b in found[spec.file]]
        assert sum(max(0, b - a) for a, b in inside) == spec.size, spec.name


SOURCES: dict[str, Callable[[Path], Path]] = {
    "llama": sources.base,
    "gpt-oss": sources.gpt_oss,
    "pytorch": sources.pytorch,
    **{name: sources.SOURCES[row][name] for row, name in (("AWQ", "awq"), ("FP8 block (DeepSeek)", "fp8"))},
}


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize(
    ("source", "presets"),
    [
        ("llama", "nf4"), ("llama", "hqq4"), ("llama", "w4a16"), ("llama", "nvfp4a16"), ("llama", "gguf_q4_k_m"),
        ("llama", "none"), ("gpt-oss", "nf4"), ("gpt-oss", "gguf_q8_0"), ("pytorch", "nf4"),
        ("awq", "mlx_int4"), ("fp8", "nf4"), ("llama", "nf4,hqq4,mlx_int4,gguf_q8_0"),
    ],
)  # fmt: skip
def test_every_stored_byte_is_fetched_once(
    source: str,
    presets: str,
    proxy: Proxy,
    shelves: Address,
    tmp_path: Path,
    weightmill: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SOURCES[source](tmp_path)
    address = through(proxy, shelves, model, tmp_path)
    at_first_unit(monkeypatch, proxy.forget)  # what is fetched of headers before does not count
    many = ("-m", f"output.root={tmp_path / 'outs'}") if "," in presets else (f"output.path={tmp_path / 'out'}",)
    ran = weightmill(
        "run",
        f"model.path={address}",
        *many,
        f"quant={presets}",
        f"unit_mb={1 if ',' in presets else 0.05}",
        "cluster.threads=3",
    )
    assert ran.status == 0, ran.err
    check_once(proxy, model)


# --- bounds that the plan states


def stated(said: str, what: str) -> float:
    """The bytes that a plan says are needed."""
    match = re.search(rf"{what}(?:: needs|: up to) ([\d.]+) (kB|MB|GB)", said)
    assert match is not None, said
    return float(match[1]) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[match[2]]


@pytest.mark.usefixtures("small_segments")
def test_scratch_is_as_the_plan_says(
    shelves: Address, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tensor that two passes read and the budget cannot hold, and of the outputs of the units in flight."""
    monkeypatch.setattr(remote, "LEAST_MB", 0.001)
    (tmp_path / "scratch").mkdir()
    now, most, made = [0], [0], list[int]()
    honest = segments.ScratchMemory

    def scratch(size: int, folder: str | None) -> Any:
        assert folder == str(tmp_path / "scratch")
        memory = honest(size, folder)
        made.append(size)
        now[0] += size
        most[0] = max(most[0], now[0])
        weakref.finalize(memory, lambda: now.__setitem__(0, now[0] - size))
        return memory

    monkeypatch.setattr(segments, "ScratchMemory", scratch)
    place = ShelfPlace(shelves / tmp_path.name)
    source = fill(place, sources.base(tmp_path), "model")
    given = (
        f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=hqq4", "strategy=remote",
        "strategy.memory_budget_mb=0.03", f"store.scratch={tmp_path / 'scratch'}", "unit_mb=0.05",
    )  # fmt: skip
    plan = weightmill("plan", *given)
    assert plan.status == 0, plan.err
    ran = weightmill("run", *given)
    assert ran.status == 0, ran.err
    assert len(made) > 1
    assert most[0] <= stated(plan.out, "scratch") * 1.01
    assert max(made) == pytest.approx(stated(plan.out, "scratch"), rel=0.01)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_outputs_on_their_way_take_the_scratch_that_the_plan_says(
    s3_bucket: Address, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ObjectPlace(s3_bucket / tmp_path.name)
    folder = tmp_path / "scratch"
    folder.mkdir()
    sizes: list[int] = []
    honest = ObjectDestination.keep

    def keep(self: Any, *given: Any) -> Any:
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        return honest(self, *given)

    monkeypatch.setattr(ObjectDestination, "keep", keep)
    given = (
        f"model.path={sources.base(tmp_path)}", f"output.path={place.address / 'out'}", "quant=nf4", "unit_mb=0.05",
        f"store.scratch={folder}", "store.scratch_mb=16", "cluster.units_at_once=2",
    )  # fmt: skip
    plan = weightmill("plan", *given)
    ran = weightmill("run", *given, "format=json")
    assert ran.status == 0, ran.err
    assert "disk: needs" not in plan.out
    assert 0 < max(sizes) <= stated(plan.out, "scratch")
    assert ran.document["run"]["upload_s"] > 0
    assert ran.document["run"]["bound_by"] in ("encode", "upload")
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_a_full_disk_of_scratch_is_said_before_any_work(
    s3_bucket: Address, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.orchestration.needs.free_bytes", lambda path: 1000)
    place = ObjectPlace(s3_bucket / tmp_path.name)
    ran = weightmill("run", f"model.path={sources.base(tmp_path)}", f"output.path={place.address / 'out'}", "quant=nf4")
    assert ran.status == 1
    assert re.search(r"store\.scratch: .* needs [\d.]+ kB for files on their way, 1\.00 kB are free", ran.err)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks at /proc")
@pytest.mark.parametrize("preset", ["nf4", "hqq4"])
def test_memory_is_as_the_plan_says(preset: str, shelves: Address, tmp_path: Path, weightmill: Any) -> None:
    """A source of 210 MB with 64 MB of budget; tensors of 8 MB, and one of 67 MB."""
    rng = np.random.default_rng(0)

    def matrix(rows: int) -> Raw:
        return Raw("BF16", rng.integers(0x3C00, 0x3D00, (rows, 2048), np.uint16))

    tensors = {"embed.weight": matrix(16384)}
    tensors |= {f"layers.{layer}.{name}.weight": matrix(2048) for layer in range(2) for name in "abcdefgh"}
    folder = write_checkpoint(tmp_path / "model", tensors, config={"model_type": "unheard_of"}, shards=2)
    source = fill(ShelfPlace(shelves / tmp_path.name), folder, "model")
    given = (
        f"model.path={source}", "strategy=remote", "strategy.memory_budget_mb=64", "unit_mb=40", f"quant={preset}",
        "cluster.threads=2", "output=hf" if preset == "nf4" else "output=auto",
    )  # fmt: skip
    plan = weightmill("plan", *given, f"output.path={tmp_path / 'out'}")
    assert plan.status == 0, plan.err
    for number in range(2):  # the first brings kernels and libraries
        ran = weightmill("run", *given, f"output.path={tmp_path / f'out{number}'}", "format=json")
        assert ran.status == 0, ran.err
    assert ran.document["run"]["bound_by"] in ("fetch", "encode")
    libraries = 40e6  # the interpreter's own, requests and threads
    assert ran.document["run"]["peak_anonymous_bytes"] <= stated(plan.out, "memory") + libraries
