"""Weights by position, as lists of files and devices: the same on every strategy and container."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.containers import gguf, writer_of
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec, MissingFile
from loaders.specs import StoredSpec, StoredTensor
from loaders.strategies import loader
from tests import object_servers
from tests.loaders.strategies.test_strategies import EVERY, a_loader, made, pairs, raw_bytes
from tests.making import LLAMA, Raw, write_checkpoint, write_safetensors

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engine
SHARDED = [pair for pair in pairs() if pair.values[1] in ("safetensors", "pytorch")]
SUFFIXES = (".safetensors", ".bin", ".gguf")


def weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


@EVERY
def test_a_list_of_files_and_a_device_are_taken_by_position(name: str, container: str, tmp_path: Path) -> None:
    wanted = {key: raw.data.tobytes() for key, raw in made(container, tmp_path / "m").items()}
    files = weight_files(tmp_path / "m")
    for given in (files, [str(each) for each in files], (each for each in files), tmp_path / "m"):
        found = list(a_loader(name).iterate_weights(given, "cpu"))
        assert {key: raw_bytes(value) for key, value in found} == wanted
        assert all(isinstance(value, torch.Tensor) for _, value in found)
    assert set(a_loader(name).get_weight_specs(files)) == set(wanted)
    loaded = a_loader(name).load_weights(file_paths=files, device=torch.device("cpu"))
    assert {key: raw_bytes(value) for key, value in loaded.items()} == wanted
    assert all(
        isinstance(value, np.ndarray) for _, value in a_loader(name).iterate_weights(files) if name != "low_memory"
    )
    # One file is that file, also if it is a shard.
    some = a_loader(name).load_weights(files[0], "cpu")
    assert {key: raw_bytes(value) for key, value in some.items()}.items() <= wanted.items()
    assert set(some) == {spec.name for spec in open_checkpoint(tmp_path / "m").weights if spec.file == files[0].name}
    assert set(a_loader(name).load_weights([files[0]], "cpu")) == set(some)


@pytest.mark.parametrize(("name", "container"), SHARDED)
def test_files_of_several_folders_are_one_source(name: str, container: str, tmp_path: Path) -> None:
    wanted = {key: raw.data.tobytes() for key, raw in made(container, tmp_path / "m").items()}
    files = weight_files(tmp_path / "m")
    (tmp_path / "other" / "disk").mkdir(parents=True)
    files[0] = files[0].rename(tmp_path / "other" / "disk" / files[0].name)
    found = a_loader(name).load_weights(files, "cpu")
    assert {key: raw_bytes(value) for key, value in found.items()} == wanted
    slices = list(a_loader(name).iterate_slices(files))
    assert {part.spec.name for part in slices} == {key for key, raw in wanted.items() if raw}


@EVERY
def test_a_device_that_is_not_there_is_refused_before_a_weight_is_read(
    name: str, container: str, tmp_path: Path
) -> None:
    made(container, tmp_path / "m")
    files = weight_files(tmp_path / "m")
    absent = "cuda:99" if torch.cuda.is_available() else "cuda:0"
    for device in (absent, torch.device("cuda", 99), "gpu", 3):
        by = a_loader(name)
        with pytest.raises(BadSpec, match="device|backend"):
            next(iter(by.iterate_weights(files, device)))
        assert by.stats.bytes == 0


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    write_checkpoint(tmp_path / "m", config=LLAMA, shards=2)
    return weight_files(tmp_path / "m")


def refused(given: Any, said: str) -> BadSpec:
    with pytest.raises(BadSpec, match=said) as caught:
        loader("lazy").load_weights(given, "cpu")
    return caught.value


@pytest.mark.quick
def test_all_missing_files_are_named_at_once(files: list[Path], tmp_path: Path) -> None:
    gone = [tmp_path / "m" / "a.safetensors", tmp_path / "nowhere" / "b.gguf"]
    error = refused([files[0], *gone], "2 of 3 files not found: .*a.safetensors, .*b.gguf")
    assert isinstance(error, FileNotFoundError)
    assert isinstance(refused(gone[0], "found nothing there"), MissingFile)
    assert isinstance(refused(tmp_path / "nowhere", "found nothing there"), FileNotFoundError)


@pytest.mark.quick
def test_a_tensor_in_two_files_is_refused_with_both(files: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "o" / "copy.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(files[0].read_bytes())
    refused(
        [*files, copy], r"'[\w.]+' is in m/model-00001-of-00002.safetensors and in o/copy.safetensors, and \d+ other"
    )
    refused([*files, files[0]], "model-00001-of-00002.safetensors more than once")


@pytest.mark.quick
def test_files_of_unlike_containers_are_refused(files: list[Path], tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m" / "extra.pt")
    refused(
        [*files, tmp_path / "m" / "extra.pt"], r"of one container, found safetensors \(.*\) and pytorch \(extra.pt\)"
    )
    refused([*files, tmp_path / "m" / "config.json"], "config.json: no file of weights")


@pytest.mark.quick
@pytest.mark.parametrize("by", ["set", "config", "metadata"])
def test_files_of_two_models_are_refused(by: str, files: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "o" / ("model-00003-of-00003.safetensors" if by == "set" else "extra.safetensors")
    other.parent.mkdir()
    write_safetensors(other, {"extra.weight": Raw("F32", np.ones(4, np.float32))})
    said = {
        "set": "model-00001-of-00002.safetensors is of a set of 2 shards, o/model-00003-of-00003.safetensors of 3",
        "config": r"in .*m/config.json it says hidden_size: \d+, in .*o/config.json 77",
        "metadata": "in m/model-00001-of-00002.safetensors its metadata says format: pt, in o/extra.safetensors mlx",
    }
    if by == "config":
        (other.parent / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": 77}))
    if by == "metadata":
        for file, kind in ((files[0], "pt"), (other, "mlx")):
            data = file.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            head = json.dumps({**json.loads(data[8:end]), "__metadata__": {"format": kind}}).encode()
            file.write_bytes(len(head).to_bytes(8, "little") + head + data[end:])
    error = refused([*files, other], said[by])
    assert "files of two models" in str(error)


@pytest.mark.quick
def test_parts_of_a_split_gguf_are_taken_in_any_order(tmp_path: Path) -> None:
    parts = []
    for number in range(2):
        stored = [StoredTensor(f"blk.{number}.up.weight", StoredSpec(DTYPES["F32"], (2, 32)))]
        laid = gguf.lay_out(f"m-0000{number + 1}-of-00002.gguf", stored)
        head = {"general.architecture": gguf.text("none"), **gguf.split_metadata(number, 2, 2)}
        writer = writer_of(tmp_path / laid.name, gguf.with_head(laid, head))
        writer.write(laid.slots[0], 0, np.full(64, number, np.float32).view(np.uint8).data)
        writer.seal()
        writer.close()
        parts.append(tmp_path / laid.name)
    found = loader("read").load_weights(parts[::-1], "cpu")
    assert {name: float(value.mean()) for name, value in found.items()} == {
        "blk.1.up.weight": 1.0,
        "blk.0.up.weight": 0.0,
    }
    with pytest.raises(BadCheckpoint, match="it says it is file 1 of 2"):
        loader("read").load_weights(parts[1:])


@pytest.mark.quick
@pytest.mark.parametrize("given", [[], [3], {"a": 1}, b"model.safetensors", 7, None])
def test_what_is_no_list_of_files_is_refused(given: Any) -> None:
    refused(given, "file_paths: (an empty list|expected a path, a checkpoint or a list of paths)")


@pytest.mark.quick
def test_folders_belong_into_no_list(files: list[Path]) -> None:
    refused([files[0].parent], "m is a folder; a list has files only")


def test_links_and_paths_from_here_are_files_too(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {name: raw_bytes(value) for name, value in loader("read").load_weights(files).items()}
    (tmp_path / "blobs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    blob = files[1].rename(tmp_path / "blobs" / "0123")
    files[1].symlink_to(blob)
    monkeypatch.chdir(tmp_path)
    given = ["link/../m/model-00001-of-00002.safetensors", Path("link") / files[1].name]
    for name in ("lazy", "read", "multithread", "remote"):
        found = loader(name).load_weights(given)
        assert {key: raw_bytes(value) for key, value in found.items()} == wanted


def test_files_of_a_server_are_listed_too(files: list[Path], tmp_path: Path) -> None:
    wanted = {name: raw_bytes(value) for name, value in loader("read").load_weights(files).items()}
    with object_servers.http(tmp_path) as (address, _):
        given = [f"{address}/m/{file.name}" for file in files]
        found = loader("auto").load_weights(given, "cpu")
        assert {key: raw_bytes(value) for key, value in found.items()} == wanted
        missing = refused([given[0], f"{address}/m/none.safetensors"], "1 of 2 files not found: http.*none.safetensors")
        assert isinstance(missing, FileNotFoundError)
        refused([given[0], files[1]], "files of one list lie in one store")
