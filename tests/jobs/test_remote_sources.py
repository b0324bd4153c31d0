"""Jobs whose source lies in a store that is not local: what they fetch, and what they hold of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import jobs.execution.unit
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.storage.address import Address
from loaders.storage.base import Range
from loaders.strategies.reading import fetching, segments, sparse_memory
from tests import sources
from tests.proxy import Proxy
from tests.shelf.places import ShelfPlace, fill


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


@pytest.fixture
def counted(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The proxy, which counts from the first unit on: what is fetched of headers before does not count."""
    honest, ran = jobs.execution.unit.run_unit, list[str]()

    def counting(task: Any, on_bytes: Any, stop: Any) -> Any:
        if not task.source.is_local:
            if not ran:
                proxy.forget()
            ran.append(task.unit.id)
        return honest(task, on_bytes, stop)

    monkeypatch.setattr(jobs.execution.unit, "run_unit", counting)
    return proxy


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
    source: str, presets: str, counted: Proxy, shelves: Address, tmp_path: Path, weightmill: Any
) -> None:
    model = SOURCES[source](tmp_path)
    address = through(counted, shelves, model, tmp_path)
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
    check_once(counted, model)
