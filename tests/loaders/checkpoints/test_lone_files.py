"""One weight file as a source, wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.checkpoints.file_lists import open_weights
from loaders.errors import BadSpec, MissingFile
from loaders.storage import open_source, open_store
from loaders.storage.address import Address
from loaders.strategies import loader
from tests.making import make_source, write_checkpoint
from tests.shelf.places import Place, contents, fill


@pytest.fixture
def two(place: Place, tmp_path: Path) -> Address:
    """A place with two models of one file each, and a config."""
    folder = write_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    other = write_checkpoint(tmp_path / "o", shards=2)
    for file in other.glob("model-*"):
        file.rename(folder / file.name.replace("model", "two"))
    return fill(place, folder, "m")


def test_a_file_is_a_model(two: Address) -> None:
    found = open_checkpoint(two / "one.safetensors")
    assert found.address == two / "one.safetensors"
    assert [entry.name for entry in found.files] == ["one.safetensors"]
    assert "config.json" in found.aux
    values = dict(loader("auto").iterate_weights(found))
    assert all(np.asarray(value).size for value in values.values())
    assert open_source(found.address).find("two-00001-of-00002.safetensors") is None


def test_a_shard_stands_for_its_set(two: Address) -> None:
    found = open_checkpoint(two / "two-00002-of-00002.safetensors")
    assert [entry.name for entry in found.files] == [f"two-0000{n}-of-00002.safetensors" for n in (1, 2)]


def test_a_list_has_the_files_that_it_names_and_no_others(two: Address) -> None:
    shard = two / "two-00002-of-00002.safetensors"
    found = open_weights([str(shard)])
    assert [entry.name for entry in found.files] == [shard.name]
    assert found.config == open_checkpoint(two / "one.safetensors").config
    values = dict(loader("auto").iterate_weights([str(shard)]))
    assert set(values) == {spec.name for spec in found.weights}
    both = open_weights([shard.text, (two / "two-00001-of-00002.safetensors").text])
    assert len(both.weights) == len(open_checkpoint(shard).weights)
    with pytest.raises(MissingFile, match=r"2 of 3 files not found: .*three.safetensors, .*four.safetensors"):
        open_weights([shard.text, (two / "three.safetensors").text, (two / "four.safetensors").text])


def test_other_files_are_none(two: Address) -> None:
    if two.scheme != "shelf":  # which has no word for it
        with pytest.raises(BadSpec, match="found a file; give the folder it lies in, or a file of weights"):
            open_checkpoint(two / "config.json")
    with pytest.raises(BadSpec, match="found nothing there"):
        open_checkpoint(two / "three.safetensors")


def test_of_several_ggufs_one_is_given(place: Place, tmp_path: Path, weightmill: Any) -> None:
    model = make_source(tmp_path / "model")
    for quant in ("gguf_q8_0", "gguf_q4_0"):
        ran = weightmill("run", f"model.path={model}", f"output.path={tmp_path / quant}", f"quant={quant}")
        assert ran.status == 0, ran.err
        [file] = (tmp_path / quant).glob("*.gguf")
        place.put(f"g/{quant}.gguf", file.read_bytes())
    where = place.address / "g"
    ran = weightmill("plan", f"model.path={where}", "quant=mlx_int4")
    assert ran.status == 2
    assert f"gguf_q4_0.gguf, gguf_q8_0.gguf; give the one that is wanted: {where}/gguf_q4_0.gguf" in ran.err
    outs = [place.address / "from-file", place.address / "from-folder"]
    assert weightmill("run", f"model.path={where}/gguf_q8_0.gguf", f"output.path={outs[0]}", "quant=nf4").status == 0
    whole = tmp_path / "gguf_q8_0"
    assert weightmill("run", f"model.path={whole}", f"output.path={outs[1]}", "quant=nf4").status == 0
    weights = [{n: d for n, d in contents(out).items() if n.endswith(".safetensors")} for out in outs]
    assert weights[0] == weights[1] != {}
    assert weightmill("verify", f"output.path={outs[0]}").status == 0
    assert open_store(where / "gguf_q8_0.gguf").absence() is not None


@pytest.mark.quick
def test_a_page_beside_one_file_is_nothing_of_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "report.html").write_text("a page")
    assert not any("report.html" in note for note in open_checkpoint(folder / "model.safetensors").notes)
    assert any("report.html" in note for note in open_checkpoint(folder).notes)
