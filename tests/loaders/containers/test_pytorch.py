"""Reading PyTorch files in place, without running what they say."""

from __future__ import annotations

import collections
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.containers.pytorch import read_specs, read_state
from loaders.dtypes import storage_of
from loaders.errors import BadCheckpoint
from loaders.specs import WeightSpec
from loaders.strategies import LOADERS, loader
from loaders.tensors.logical_tensor import LogicalTensor, Window
from loaders.tensors.views import StoredView
from tests.reading import files_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engine


def state_dict() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(4, 6)
    return collections.OrderedDict(
        plain=base,
        alias=base,
        turned=base.T,
        rows=base[1:3],
        every_second=base[:, ::2],
        bf16=torch.randn(5, 3).bfloat16(),
        fp8=torch.randn(4).to(torch.float8_e4m3fn),
        ids=torch.arange(7)[None],
        flag=torch.tensor([True, False]),
        scalar=torch.tensor(3.0),
        empty=torch.zeros(0, 4),
        unsigned=torch.arange(3).to(torch.uint16),
        parameter=torch.nn.Parameter(torch.ones(2, 2)),
    )


def as_bytes(tensor: Any) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def read_all(root: Path, specs: tuple[WeightSpec, ...], strategy: str) -> dict[str, bytes]:
    found = {}
    with loader(strategy).open(files_of(root), specs) as reader:
        for spec in specs:
            tensor = LogicalTensor(
                name=spec.name,
                dtype=spec.dtype,
                shape=spec.shape,
                stored=(("weight", spec),),
                window=Window.whole(spec),
                decode=None,
            )
            view = StoredView(reader, tensor.spec, spec, Window.whole(spec))
            count = tensor.spec.num_items
            halves = [view.read(0, count // 2).copy(), view.read(count // 2, count).copy()] if count else []
            found[spec.name] = b"".join(half.astype(storage_of(spec.dtype)).tobytes() for half in halves)
    return found


@pytest.mark.quick
@pytest.mark.parametrize("strategy", sorted(set(LOADERS) - {"fastsafetensors"}))  # it reads safetensors only
@pytest.mark.parametrize("legacy", [False, True])
def test_every_tensor_reads_as_torch_reads_it(tmp_path: Path, legacy: bool, strategy: str) -> None:
    state = state_dict()
    for name in ("fp8", "unsigned") if legacy else ():  # torch writes these, but cannot read them back
        del state[name]
    torch.save(state, tmp_path / "m.bin", _use_new_zipfile_serialization=not legacy)
    specs = read_specs(files_of(tmp_path), "m.bin")
    assert {spec.name for spec in specs} == set(state)
    found = read_all(tmp_path, specs, strategy)
    wanted = torch.load(tmp_path / "m.bin", weights_only=True)
    assert {name: as_bytes(tensor) for name, tensor in wanted.items()} == found


def test_tensors_that_share_bytes_are_told(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "m.bin")
    aliases = {spec.name: spec.alias for spec in read_specs(files_of(tmp_path), "m.bin") if spec.alias}
    assert aliases == {"plain": "alias"} or aliases == {"alias": "plain"}


def test_a_modules_state_dict_and_a_trainers_checkpoint_are_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 4)
    torch.save(module.state_dict(), tmp_path / "module.pt")
    torch.save({"state_dict": module.state_dict(), "epoch": 3, "lr": [0.1]}, tmp_path / "trainer.pt")
    for file in ("module.pt", "trainer.pt"):
        assert {s.name for s in read_specs(files_of(tmp_path), file)} == {"weight", "bias"}


class RunsCode:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.quick
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": RunsCode()}, "m.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadCheckpoint, match=r"asks for \w+\.system"):
        read_specs(files_of(tmp_path), "m.bin")
    assert not (tmp_path / "pwned").exists()


HOSTILE = {
    "a call of what stands on the stack": b"\x80\x02]U\x01a\x85R.",
    "an attribute on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x0c__defaults__K\x01sb.",
    "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "a dotted name": b"\x80\x04\x8c\x0ctorch._utils\x8c\x1b_rebuild_tensor_v2.__globals__\x93.",
    "a builtin": b"c__builtin__\neval\n(S'1'\ntR.",
}


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_pickles_are_refused(tmp_path: Path, what: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
        archive.writestr("m/data.pkl", HOSTILE[what])
    with pytest.raises(BadCheckpoint):
        read_specs(files_of(tmp_path), "m.bin")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("what", "shift"), [("views", 1), ("tensors", 0)])
def test_many_tensors_of_one_storage_are_refused(tmp_path: Path, legacy: bool, what: str, shift: int) -> None:
    storage = torch.ones(1 << 18)
    state = {f"layers.{n}.weight": storage[n * shift :][: 1 << 17] for n in range(300)}
    torch.save(state, tmp_path / "m.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadCheckpoint, match=f"its {what} have 157286400 bytes in a file of .* share storages"):
        read_specs(files_of(tmp_path), "m.bin")


def test_layers_that_are_one_and_a_turned_twin_are_read(tmp_path: Path) -> None:
    shared, embedding = torch.ones(512, 512), torch.ones(300, 1024)
    state = {f"layers.{n}.weight": shared for n in range(48)} | {"embed": embedding, "head": embedding.T}
    torch.save(state, tmp_path / "m.bin")
    assert len(read_specs(files_of(tmp_path), "m.bin")) == 50


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for legacy in (False, True):
        torch.save({"a": torch.ones(1000)}, tmp_path / "m.bin", _use_new_zipfile_serialization=not legacy)
        data = (tmp_path / "m.bin").read_bytes()
        (tmp_path / "m.bin").write_bytes(data[:-600])
        with pytest.raises(BadCheckpoint, match="truncated"):
            read_specs(files_of(tmp_path), "m.bin")


def rewrite(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in members.items():
            new.writestr(name, change(name, data))


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(64)}, tmp_path / "m.bin")
    sixty_four, more = b"K@\x85", b"Kp\x85"
    rewrite(tmp_path / "m.bin", lambda name, data: data.replace(sixty_four, more) if name.endswith(".pkl") else data)
    with pytest.raises(BadCheckpoint, match="leaves its storage of 256 bytes"):
        read_specs(files_of(tmp_path), "m.bin")


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(64)}, tmp_path / "m.bin")
    rewrite(tmp_path / "m.bin", lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadCheckpoint, match="compressed"):
        read_specs(files_of(tmp_path), "m.bin")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02K\x01.", b"PK\x03\x04"])
def test_files_that_are_no_pytorch_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.bin").write_bytes(data)
    with pytest.raises(BadCheckpoint):
        read_specs(files_of(tmp_path), "m.bin")


def test_a_pickle_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"lr": 0.1}, tmp_path / "m.bin")
    with pytest.raises(BadCheckpoint, match="no state dict"):
        read_specs(files_of(tmp_path), "m.bin")


def test_a_memo_of_absurd_size_does_not_allocate(tmp_path: Path) -> None:
    stream = io.BytesIO()
    stream.write(b"\x80\x02}r\xff\xff\xff\xff.")
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
        archive.writestr("m/data.pkl", stream.getvalue())
    with pytest.raises(BadCheckpoint, match="no state dict"):
        read_specs(files_of(tmp_path), "m.bin")


def test_numbers_are_what_numpy_reads(tmp_path: Path) -> None:
    tensor = torch.randn(3, 5)
    torch.save({"a": tensor}, tmp_path / "m.bin")
    [spec] = read_specs(files_of(tmp_path), "m.bin")
    raw = (tmp_path / "m.bin").read_bytes()[spec.offset : spec.offset + spec.size]
    assert np.array_equal(np.frombuffer(raw, np.float32).reshape(3, 5), tensor.numpy())


@pytest.mark.parametrize(
    ("made", "keys", "beside"),
    [
        ({"state_dict": {"w": 1}, "loss": 2}, ("state_dict",), ()),
        ({"model": {"w": 1}, "ema": {"w": 2}, "epoch": 3}, ("model",), ("ema",)),
        ({"state_dict": {"model": {"module": {"w": 1}}}}, ("state_dict", "model", "module"), ()),
        ({"w": 1}, (), ()),
    ],
)
def test_the_model_is_found_below_the_top(tmp_path: Path, made: Any, keys: Any, beside: Any) -> None:
    def tensors(part: Any) -> Any:
        return {k: tensors(v) for k, v in part.items()} if isinstance(part, dict) else torch.tensor(float(part))

    torch.save(tensors(made), tmp_path / "x.pt")
    state = read_state(files_of(tmp_path), "x.pt")
    assert [spec.name for spec in state.specs] == ["w"]
    assert (state.keys, state.beside) == (keys, beside)


@pytest.mark.parametrize("made", [{"ema": {"a.w": 1}, "epoch": 3}, {"one": {"a.w": 1}, "two": {"a.w": 1}}])
def test_averaged_weights_and_several_models_are_not_taken_for_the_model(tmp_path: Path, made: Any) -> None:
    torch.save(
        {k: {n: torch.ones(2) for n in v} if isinstance(v, dict) else v for k, v in made.items()}, tmp_path / "x.pt"
    )
    with pytest.raises(BadCheckpoint, match="no state dict of tensors, at the top or under state_dict"):
        read_specs(files_of(tmp_path), "x.pt")


def test_an_optimizers_state_is_named(tmp_path: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match="which is the state of an optimizer"):
        read_specs(files_of(tmp_path), "x.pt")


def test_a_dict_that_holds_itself_is_read_to_an_end(tmp_path: Path) -> None:
    made: dict[str, Any] = {"w": torch.ones(2)}
    made["model"] = made
    torch.save(made, tmp_path / "x.pt")
    assert [spec.name for spec in read_specs(files_of(tmp_path), "x.pt")] == ["w"]
