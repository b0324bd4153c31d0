"""fastsafetensors, with and without GPU direct storage."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec, StorageError
from loaders.strategies import FastSafetensorsLoader, fastsafetensors, loader
from tests.loaders.strategies.writing import write


@pytest.mark.engine
def test_other_containers_are_refused_by_fastsafetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadSpec, match="it reads safetensors, found pytorch_model.bin; strategy=multithread reads it"):
        loader("fastsafetensors").load_weights(tmp_path)


class Gds:
    """A machine with GPU direct storage, as far as the loader sees it; tensors lie in the CPU's memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.calls: list[bool] = []
        self.devices: list[str] = []
        made = fastsafetensors.Buffer

        def buffer(path: Path, names: list[str], device: str, gds: bool) -> fastsafetensors.Buffer:
            self.calls.append(gds)
            self.devices.append(device)
            if gds and error is not None:
                raise error
            return made(path, names, "cpu", False)

        monkeypatch.setattr(fastsafetensors, "Buffer", buffer)
        monkeypatch.setattr(fastsafetensors, "gds_available", lambda index=0: True)
        torch, cuda = pytest.importorskip("torch"), SimpleNamespace(current_device=lambda: 1)
        fake = SimpleNamespace(cuda=cuda)  # torch's own must go on saying that there is no GPU: the library asks it
        monkeypatch.setattr(fastsafetensors, "torch_device", lambda device: (fake, torch.device(device)))


def bytes_on(by: FastSafetensorsLoader, folder: Path, device: str) -> dict[str, bytes]:
    checkpoint = open_checkpoint(folder)
    found = {}
    for file in sorted({spec.file for spec in checkpoint.weights}):
        mine = [spec for spec in checkpoint.weights if spec.file == file]
        for spec, tensor in zip(mine, by.file(folder, mine, device), strict=True):
            found[spec.name] = fastsafetensors._bytes_of(tensor).tobytes()
    return found


@pytest.mark.engine
def test_direct_storage_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastsafetensors")
    wanted, gds = write(tmp_path / "m"), Gds(monkeypatch)
    by = FastSafetensorsLoader()
    assert bytes_on(by, tmp_path / "m", "cuda:0") == wanted
    assert (gds.calls, by.said) == ([True, True], "with GPU direct storage")
    by = FastSafetensorsLoader(gds=False)
    assert bytes_on(by, tmp_path / "m", "cuda:0") == wanted
    assert by.said == "without GPU direct storage: as asked"


@pytest.mark.engine
@pytest.mark.parametrize(("device", "wanted"), [("cuda", "cuda:1"), ("cuda:0", "cuda:0")])
def test_a_gpu_without_a_number_is_the_current_one(
    device: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fastsafetensors 0.5 sets torch's device, which "cuda" alone does not name."""
    pytest.importorskip("fastsafetensors")
    bytes_of, gds = write(tmp_path / "m"), Gds(monkeypatch)
    assert bytes_on(FastSafetensorsLoader(), tmp_path / "m", device) == bytes_of
    assert set(gds.devices) == {wanted}


@pytest.mark.engine
def test_direct_storage_that_fails_is_done_without_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("fastsafetensors")
    wanted = write(tmp_path / "m")
    Gds(monkeypatch, RuntimeError("cuFileDriverOpen failed: 5001"))
    with caplog.at_level(logging.INFO, "weightmill"):
        assert bytes_on(FastSafetensorsLoader(), tmp_path / "m", "cuda") == wanted
    [said] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "without GPU direct storage: GPU direct storage failed (cuFileDriverOpen failed: 5001)" in said.message
    with pytest.raises(StorageError, match=r"strategy.gds: GPU direct storage failed on .*cuFileDriverOpen"):
        bytes_on(FastSafetensorsLoader(gds=True), tmp_path / "m", "cuda")


@pytest.mark.engine
def test_missing_direct_storage_is_said_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("fastsafetensors")
    wanted = write(tmp_path / "m")
    Gds(monkeypatch)
    monkeypatch.setattr(fastsafetensors, "gds_available", lambda index=0: False)
    with caplog.at_level(logging.INFO, "weightmill"):
        assert bytes_on(FastSafetensorsLoader(), tmp_path / "m", "cuda") == wanted
    assert "without GPU direct storage: this machine has none" in caplog.text
    with pytest.raises(BadSpec, match="this machine has no GPU direct storage"):
        bytes_on(FastSafetensorsLoader(gds=True), tmp_path / "m", "cuda")
    with pytest.raises(BadSpec, match="loads to a GPU, not to device=cpu"):
        bytes_on(FastSafetensorsLoader(gds=True), tmp_path / "m", "cpu")


@pytest.mark.skipif(Path("/dev/nvidia-fs0").exists(), reason="this machine has GPU direct storage")
def test_direct_storage_is_not_found_where_there_is_none() -> None:
    assert not fastsafetensors.gds_available()


@pytest.mark.engine
def test_what_fastsafetensors_gave_outlives_its_buffers(tmp_path: Path) -> None:
    library = pytest.importorskip("fastsafetensors")
    wanted = write(tmp_path / "m", items=100_000)
    found = loader("fastsafetensors").load_weights(tmp_path / "m", device="cpu")
    gc.collect()
    assert library.live_allocation_count() == 0
    assert {n: fastsafetensors._bytes_of(t).tobytes() for n, t in found.items()} == wanted
