"""Checkpoints of every container, opened and read over each kind of store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loaders import load_weights
from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec
from loaders.lint import lint_at
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import Entry, PinnedFiles
from loaders.strategies import loader
from loaders.strategies.base import Expecting, TensorBytes, Use
from tests import passes
from tests.making import llama_tensors, make_source, write_checkpoint
from tests.shelf.places import REMOTE, Place, fill

CONTAINERS = {
    "safetensors": ("none",),
    "pytorch": ("none", "output.container=pytorch"),
    "gguf": ("gguf_q8_0",),
    "gguf split": ("gguf_q4_0", "output.split=true"),
    "packed": ("mlx_int4", "output=packed"),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small Llama in a container."""
    folder = tmp_path_factory.mktemp("outputs")
    source = make_source(folder / "source")

    def made(container: str) -> Path:
        preset, *settings = CONTAINERS[container]
        out = folder / container
        if not out.exists():
            written = passes.run(source, out, preset, settings=settings)
            written[preset].folder.rename(out / "checkpoint")
        return out / "checkpoint"

    return made


def values(checkpoint: Checkpoint, strategy: str = "auto") -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in loader(strategy).iterate_weights(checkpoint)}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_checkpoint_is_the_same_wherever_it_lies(
    container: str, place: Place, outputs: Callable[[str], Path]
) -> None:
    here = open_checkpoint(outputs(container))
    there = open_checkpoint(fill(place, outputs(container), "m"))
    assert there.container == here.container == container.split(maxsplit=1)[0]
    assert there.weights == here.weights
    assert (there.fingerprint, there.config, there.notes) == (here.fingerprint, here.config, here.notes)
    assert [(entry.name, entry.size) for entry in there.files] == [(entry.name, entry.size) for entry in here.files]
    wanted, found = values(here), values(there)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert lint_at(there.address) == lint_at(here.address)


class Counting:
    """A store that counts what leaves it."""

    def __init__(self, address: Address) -> None:
        self._store = open_store(address)
        self.is_local = self._store.is_local
        self.bytes = 0
        self.requests = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        self.bytes += stop - start
        self.requests += 1
        return self._store.read(entry, start, stop)


def test_remote_fetches_every_byte_once_however_often_it_is_read(place: Place, tmp_path: Path) -> None:
    address = fill(place, write_checkpoint(tmp_path / "m", shards=2), "m")
    checkpoint = open_checkpoint(address)
    store = Counting(address)
    files = PinnedFiles(store, checkpoint.files)  # type: ignore[arg-type]
    with loader("remote").open(files, checkpoint.weights) as reader:
        assert isinstance(reader, Expecting)
        uses = [Use((TensorBytes.whole(spec),)) for spec in checkpoint.weights]
        reader.expect(uses)
        for spec, use in zip(checkpoint.weights, uses, strict=True):
            with reader.using(use):
                for _ in range(3):
                    assert len(reader.read(spec, 0, spec.size)) == spec.size
                    assert len(reader.mapped(spec)) == spec.size
    assert store.bytes == checkpoint.size
    assert store.requests == 2  # the tensors of a shard are neighbours


@pytest.mark.parametrize("kind", REMOTE)
@pytest.mark.parametrize("strategy", ["lazy", "read", "multithread", "streaming", "eager", "full"])
def test_strategies_of_local_files_say_so(
    strategy: str, kind: str, place_of: Callable[[str], Place], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(fill(place_of(kind), write_checkpoint(tmp_path / "m"), "m"))
    with pytest.raises(BadSpec, match=r"strategy=remote|is no folder of this machine"):
        values(checkpoint, strategy)


def test_a_file_that_changed_since_its_header_was_read_is_refused(place: Place, tmp_path: Path) -> None:
    address = fill(place, write_checkpoint(tmp_path / "m"), "m")
    checkpoint = open_checkpoint(address)
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    place.put("m/model.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors.* it changed while it was read"):
        values(checkpoint, "remote")


def test_an_index_cannot_name_files_elsewhere(place: Place, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002", "../m/model-00001-of-00002"))
    with pytest.raises(BadCheckpoint):
        open_checkpoint(fill(place, folder, "m"))


def test_weights_load_into_tensors_and_are_kept(place: Place, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = write_checkpoint(tmp_path / "m", llama_tensors(layers=1))
    address = fill(place, folder, "m")
    wanted, _ = load_weights(folder, quantize="nf4")
    for _ in range(2):
        found, _ = load_weights(str(address), quantize="nf4", use_cache=True)
        assert found.keys() == wanted.keys()
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(found[name].dequantize(), wanted[name].dequantize())
