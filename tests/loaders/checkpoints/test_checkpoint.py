"""Opening a folder of weights: what belongs to it, and everything that headers can tell is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec
from loaders.tensors.sources import tensors_of
from tests.making import llama_tensors, write_checkpoint, write_index


def names(path: Path) -> set[str]:
    return {spec.name for spec in open_checkpoint(path).weights}


@pytest.mark.quick
@pytest.mark.parametrize(("shards", "index"), [(1, False), (3, True), (3, False)])
def test_one_file_shards_with_and_without_an_index_hold_the_same(tmp_path: Path, shards: int, index: bool) -> None:
    write_checkpoint(tmp_path / "m", shards=shards, index=index)
    assert names(tmp_path / "m") == set(llama_tensors())


def test_aux_files_are_all_found_and_weights_are_none_of_them(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", shards=2)
    for name in ("pytorch_model.bin", "model.gguf", "original/consolidated.00.pth", "training_args.bin", "tf_model.h5"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "original/params.json").write_text("{}")
    (root / ".git").mkdir()
    (root / ".git/HEAD").write_text("x")
    aux = set(open_checkpoint(root).aux)
    assert aux == {"config.json", "tokenizer.json", "chat_template.jinja", "extra/modeling.py", "original/params.json"}


def test_weight_files_left_alone_are_said(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m")
    (root / "consolidated.safetensors").write_bytes(b"x")
    (root / "model.gguf").write_bytes(b"x")
    said = " ".join(open_checkpoint(root).notes)
    assert "consolidated.safetensors" in said
    assert "model.gguf" in said


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match="nothing there"):
        open_checkpoint(tmp_path / "absent")
    root = write_checkpoint(tmp_path / "m")
    with pytest.raises(BadSpec, match="give the folder"):
        open_checkpoint(root / "config.json")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(BadSpec, match=r"1 other weight files \(model.onnx\)"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", shards=3)
    (root / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="1 of its 3 files are missing: model-00002-of-00003.safetensors"):
        open_checkpoint(root)


def test_a_missing_shard_is_named_without_an_index(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", shards=3, index=False)
    (root / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"2 of 3 shards; missing: \[2\]"):
        open_checkpoint(root)


def test_an_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", shards=2)
    index = json.loads((root / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(root, {**index, "ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(BadCheckpoint, match="'ghost' in model-00001-of-00002.safetensors: no file has it"):
        open_checkpoint(root)


def test_an_index_that_puts_a_tensor_into_another_file_is_refused(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", shards=2)
    index = json.loads((root / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(root, {**index, "lm_head.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(BadCheckpoint, match="'lm_head.weight' in model-00002.*it is in model-00001"):
        open_checkpoint(root)


@pytest.mark.quick
@pytest.mark.parametrize("file", ["../evil.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    root = write_checkpoint(tmp_path / "m", shards=2)
    write_index(root, {"x": file})
    with pytest.raises(BadCheckpoint, match="leaves the checkpoint's folder"):
        open_checkpoint(root)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    root = write_checkpoint(tmp_path / "m", shards=2)
    (root / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadCheckpoint, match="model.safetensors.index.json"):
        open_checkpoint(root)


def test_a_link_out_of_the_folder_is_refused_but_the_hubs_cache_is_read(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m")
    secret = tmp_path / "secret"
    secret.write_text("x")
    (root / "vocab.txt").symlink_to(secret)
    with pytest.raises(BadCheckpoint, match="vocab.txt: it links to"):
        open_checkpoint(root)
    cache = tmp_path / "hub" / "models--x"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "vocab.txt").unlink()
    for number, file in enumerate(p for p in root.rglob("*") if p.is_file()):
        blob = cache / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(root)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(blob)
    assert names(snapshot) == set(llama_tensors())


@pytest.mark.parametrize("name", ["model.safetensors", "store/files/md5/0a/" + "b" * 30, "blobs/" + "0" * 64])
def test_weights_may_be_links_to_weights_elsewhere_which_is_said(tmp_path: Path, name: str) -> None:
    root, place = write_checkpoint(tmp_path / "m"), tmp_path / "elsewhere" / name
    place.parent.mkdir(parents=True)
    (root / "model.safetensors").rename(place)
    (root / "model.safetensors").symlink_to(place)
    found = open_checkpoint(root)
    assert names(root) == set(llama_tensors())
    assert found.notes == (
        f"1 link of weights leads out of the folder, model.safetensors to {place}; what is there is read",
    )
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "m.safetensors").symlink_to(place)
    assert open_checkpoint(tmp_path / "farm" / "m.safetensors").notes == ()  # the one who asks named it


@pytest.mark.parametrize("name", ["secret", "key.pem", "id_rsa", "model.bin", "weights.safetensors.key", "abc"])
@pytest.mark.parametrize("link", ["model.safetensors", "sub/other.safetensors", "model.safetensors.index.json"])
def test_weights_may_not_be_links_to_other_files(tmp_path: Path, name: str, link: str) -> None:
    root = write_checkpoint(tmp_path / "m")
    (tmp_path / name).write_text("PRIVATE")
    (root / link).unlink(missing_ok=True)
    (root / link).parent.mkdir(exist_ok=True)
    (root / link).symlink_to(tmp_path / name)
    with pytest.raises(BadCheckpoint, match=f"{link}: it links to .*/{name}, outside the checkpoint"):
        open_checkpoint(root)


def test_an_index_does_not_lead_through_a_linked_folder(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m")
    (tmp_path / "out").mkdir()
    (root / "model.safetensors").rename(tmp_path / "out" / "model.safetensors")
    (root / ".git").symlink_to(tmp_path / "out")  # a folder that is not looked into
    write_index(root, dict.fromkeys(llama_tensors(), ".git/model.safetensors"))
    with pytest.raises(BadCheckpoint, match=".git/model.safetensors: a linked folder leads out of"):
        open_checkpoint(root)


def test_the_fingerprint_is_of_the_weights_not_of_the_place(tmp_path: Path) -> None:
    one = open_checkpoint(write_checkpoint(tmp_path / "a", shards=2))
    two = open_checkpoint(write_checkpoint(tmp_path / "b", shards=2))
    other = open_checkpoint(write_checkpoint(tmp_path / "c", shards=3))
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_a_tied_head_that_is_stored_twice_stays_tied_only_if_it_is_the_same(tmp_path: Path) -> None:
    tensors = llama_tensors(tied=True)
    config = json.loads((write_checkpoint(tmp_path / "t", tensors) / "config.json").read_text())
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    found = tensors_of(open_checkpoint(write_checkpoint(tmp_path / "a", same, config=config, shards=2)), decode=False)
    assert found.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert "lm_head.weight" not in {tensor.name for tensor in found.tensors}
    other = {**tensors, "lm_head.weight": llama_tensors(seed=5)["lm_head.weight"]}
    found = tensors_of(open_checkpoint(write_checkpoint(tmp_path / "b", other, config=config)), decode=False)
    assert found.tied == ()
    assert "lm_head.weight" in {tensor.name for tensor in found.tensors}
    assert "their weights differ" in found.notes[0]


def test_both_styles_of_config_are_read(tmp_path: Path) -> None:
    from loaders.architectures.family import load_dtype

    for key in ("dtype", "torch_dtype"):
        assert str(load_dtype({key: "bfloat16"})) == "BF16"
        assert str(load_dtype({"text_config": {key: "float16"}})) == "F16"
    assert load_dtype({}) is None
    assert load_dtype({"dtype": None, "torch_dtype": None}) is None
