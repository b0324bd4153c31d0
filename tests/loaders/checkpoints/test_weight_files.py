"""Which files of a folder are the model, what is said of the others, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs.spec.keys import KEYS
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.checkpoints.weight_files import no_model
from loaders.errors import BadCheckpoint, BadSpec, settings_called
from tests.making import Raw, llama_tensors, write_checkpoint, write_index, write_safetensors

pytestmark = pytest.mark.quick

LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": Raw("F32", np.zeros((2, 4), np.float32))}


def files_of(folder: Path) -> list[str]:
    return [entry.name for entry in open_checkpoint(folder).files]


def said(folder: Path) -> str:
    return " ".join(open_checkpoint(folder).notes)


def two_sets(folder: Path) -> Path:
    """A model in two shards for transformers, and as many of its publisher's own."""
    write_checkpoint(folder, shards=2, index=False)
    for number in (1, 2):
        own = {f"layers.{number}.attention.wq.weight": llama_tensors()["lm_head.weight"]}
        write_safetensors(folder / f"consolidated-0000{number}-of-00002.safetensors", own)
    return folder


def test_a_folder_with_nothing_else_is_read_without_a_word(tmp_path: Path) -> None:
    assert said(write_checkpoint(tmp_path / "m", shards=2)) == ""


def test_transformers_shards_come_before_the_publishers_own(tmp_path: Path) -> None:
    root = two_sets(tmp_path / "m")
    assert files_of(root) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert "consolidated-00001-of-00002.safetensors, consolidated-00002-of-00002.safetensors (its publisher's" in said(
        root
    )
    for name in list(root.glob("model-*")):
        name.unlink()
    assert len(files_of(root)) == 2  # they are read where nothing else is


def test_an_index_comes_before_the_publishers_own_index(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", shards=2)
    write_safetensors(root / "consolidated.safetensors", llama_tensors())
    (root / "consolidated.safetensors.index.json").write_text('{"weight_map": {"a": "consolidated.safetensors"}}')
    assert len(files_of(root)) == 2


def test_slices_of_matrices_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"consolidated.0{number}.pth").write_bytes(b"x")
    with pytest.raises(BadCheckpoint, match="slices of every matrix"):
        open_checkpoint(tmp_path)


def test_an_index_whose_files_are_gone_is_refused_beside_a_single_file(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m")
    write_index(root, {"a": "model-00001-of-00002.safetensors"})
    with pytest.raises(BadCheckpoint, match=r"model.safetensors is there: .* remove model.safetensors.index.json"):
        open_checkpoint(root)


def test_a_newer_single_file_beside_a_whole_index_is_refused_by_name(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", shards=2)
    write_safetensors(root / "model.safetensors", llama_tensors(seed=1))
    with pytest.raises(BadCheckpoint, match=r"model.safetensors lies beside .* is newer: transformers loads"):
        open_checkpoint(root)
    then = time.time() - 1000
    os.utime(root / "model.safetensors", (then, then))
    assert len(files_of(root)) == 2
    assert "yet transformers would load it" in said(root)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m")
    write_index(root, dict.fromkeys(llama_tensors(), "model.safetensors"))
    assert files_of(root) == ["model.safetensors"]


def test_two_whole_sets_without_an_index_are_refused(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", shards=2, index=False)
    write_checkpoint(root, shards=3, index=False)
    with pytest.raises(BadCheckpoint, match="model in 2 shards and model in 3 shards"):
        open_checkpoint(root)
    (root / "model-00003-of-00003.safetensors").unlink()
    assert len(files_of(root)) == 2  # a set that is not whole is what an interrupted download left


def test_safetensors_come_before_other_formats(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m")
    for name in ("pytorch_model.bin", "model.gguf", "original/consolidated.00.pth", "optimizer.pt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    assert files_of(root) == ["model.safetensors"]
    for part in ("model.gguf, pytorch_model.bin (safetensors", "00.pth (in sub-folders", "optimizer.pt (the state of"):
        assert part in said(root)


# --- adapters


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_refused_and_what_to_do_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "meta/llama"}')
    write_safetensors(tmp_path / name, LORA)
    write_safetensors(tmp_path / "value_head.safetensors", {"v": LORA[next(iter(LORA))]})
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with settings_called(KEYS), pytest.raises(BadSpec) as refused:
        open_checkpoint(tmp_path)
    assert "an adapter of 'meta/llama', not a model" in str(refused.value)
    merge = (
        f"transform=merge_lora transform.path={tmp_path} model.path=BASE, where BASE is the folder with 'meta/llama'"
    )
    assert str(refused.value).endswith(merge)


def test_an_adapter_under_the_name_of_a_model_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", LORA)
    with pytest.raises(BadSpec, match="holds an adapter, not a model"):
        open_checkpoint(tmp_path)


def test_an_adapter_beside_its_base_is_passed_over(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m")
    (root / "adapter_config.json").write_text("{}")
    write_safetensors(root / "adapter_model.safetensors", LORA)
    assert files_of(root) == ["model.safetensors"]
    assert "adapter_model.safetensors (an adapter, which is not merged)" in said(root)


def test_an_adapter_among_the_models_tensors_is_said(tmp_path: Path) -> None:
    part = Raw("F32", np.zeros((2, 4), np.float32))
    write_safetensors(tmp_path / "model.safetensors", {"q.base_layer.weight": part, "q.lora_A.default.weight": part})
    assert "1 tensor of an adapter is among the model's and not merged" in said(tmp_path)


# --- what training leaves


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("optimizer.pt", "the state of a training; give the folder that holds the model itself"),
        ("global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed.*zero_to_fp32.py"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "FSDP.*accelerate merge-weights"),
        ("model_world_size_2_rank_0.pt", "one rank"),
        ("iter_01/mp_rank_00/model_optim_rng.pt", "one rank"),
        ("model-rank-0-part-0.safetensors", "one rank"),
        ("checkpoint-5/model.safetensors", "in its sub-folders only: checkpoint-5"),
    ],
)
def test_a_folder_without_a_model_says_what_to_do(tmp_path: Path, file: str, match: str) -> None:
    for name in (file, "training_args.bin", "rng_state_0.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadSpec, match=match):
        open_checkpoint(tmp_path)


def test_only_states_and_pieces_are_taken_for_no_model() -> None:
    """A name that merely begins like one of these is a model's."""
    models = (
        "optimal-7b.bin", "model.safetensors", "scaled.pt", "franken-rank.bin", "adapted.safetensors", "frank1.pt",
        "rank.pt", "samplers.bin", "model-00001-of-00002.safetensors", "pytorch_model_fsdp.bin",
    )  # fmt: skip
    assert [name for name in models if no_model(name) is not None] == []
    states = (
        "optimizer_0.bin", "optimizer.bin", "scheduler.bin", "scaler.pt", "rng_state_3.pth", "random_states_0.pkl",
        "sampler_1.bin", "custom_checkpoint_0.pkl", "optimizer.safetensors", "mmproj-F16.gguf", "m-mmproj-f16.gguf",
        "0000100_adapters.safetensors",
        "adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json",
    )  # fmt: skip
    assert [name for name in states if no_model(name) is None] == []


# --- hostile files, and links


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"weight_map": []}', "expected a weight_map"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ('{"weight_map": ' + "[" * 100_000, "not JSON"),
        ('{"x": ' + "9" * 5000 + "}", "not JSON"),
        ('{"weight_map": {"a": "\\ud800.safetensors"}}', "no name of a file"),
        ('{"weight_map": {"a": "b\\u0000"}}', "no name of a file"),
        ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', "no name of a file"),
        ('{"weight_map": {"\\ud800": "model.safetensors"}}', "no file has it"),
    ],
)
def test_a_hostile_index_gets_one_short_error(tmp_path: Path, text: str, match: str) -> None:
    root = write_checkpoint(tmp_path / "m")
    (root / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadCheckpoint, match=match) as refused:
        open_checkpoint(root)
    assert len(str(refused.value)) < 500
    assert str(refused.value).isprintable()


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(BadCheckpoint, match="model.safetensors: expected a file, found a link to a file that is not"):
        open_checkpoint(tmp_path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def socket_at(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:  # their paths are short
        made.bind(path.name)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "deep/vocab.txt", "model.safetensors", "other.bin"])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (fifo, "a FIFO"),
        (socket_at, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to(path.name), "a link to a file that is not there"),
    ],
)
def test_what_is_no_file_is_refused_where_a_file_belongs(
    tmp_path: Path, name: str, make: Callable[[Path], None], what: str
) -> None:
    path = write_checkpoint(tmp_path / "m") / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(BadCheckpoint, match=f"{name}: expected a file, found {what}"):
        open_checkpoint(tmp_path / "m")


def test_sockets_beside_a_single_file_are_not_its_own(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m")
    socket_at(root / "agent")
    assert open_checkpoint(root / "model.safetensors").files
    (root / "config.json").unlink()
    fifo(root / "config.json")
    with pytest.raises(BadCheckpoint, match="config.json: expected a file, found a FIFO"):
        open_checkpoint(root / "model.safetensors")


def test_too_many_files_are_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.checkpoints.checkpoint.MOST_FILES", 3)
    with pytest.raises(BadCheckpoint, match="files, at most 3 are looked through"):
        open_checkpoint(write_checkpoint(tmp_path / "m", shards=3))


def test_folders_in_one_another_are_looked_through_only_so_deep(tmp_path: Path) -> None:
    deep = write_checkpoint(tmp_path / "deep") / "/".join("d" * 101)
    deep.mkdir(parents=True)
    assert open_checkpoint(tmp_path / "deep")
    (deep / "a").touch()
    with pytest.raises(BadCheckpoint, match="lies 101 folders deep, at most 100 are looked through"):
        open_checkpoint(tmp_path / "deep")


@pytest.mark.parametrize("where", [lambda hub: hub / "link", lambda hub: hub / "models--x/snapshots/abc/inner"])
def test_a_snapshot_is_read_behind_a_link_and_from_a_folder_in_it(
    tmp_path: Path, where: Callable[[Path], Path]
) -> None:
    hub = tmp_path / "hub"
    blobs, inner = hub / "models--x/blobs", hub / "models--x/snapshots/abc/inner"
    for folder in (blobs, inner):
        folder.mkdir(parents=True)
    for number, file in enumerate(p for p in write_checkpoint(tmp_path / "m").iterdir() if p.is_file()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (inner / file.name).symlink_to(f"../../../blobs/{number}")
    (hub / "link").symlink_to(inner)
    assert json.loads((where(hub) / "config.json").read_text()) == open_checkpoint(where(hub)).config
    assert "tokenizer.json" in open_checkpoint(where(hub)).aux
