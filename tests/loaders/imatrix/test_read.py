"""Importance matrices: both forms give what llama-quantize takes from them, and what is damaged is refused by cause."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loaders.containers import gguf
from loaders.errors import BadCheckpoint, BadSpec, MissingFile
from loaders.imatrix import read
from loaders.imatrix.read import open_matrix
from loaders.loading.load import load_weights
from loaders.places import DEMO
from loaders.presets.catalog import preset
from loaders.storage.hashes import digest
from tests import object_servers
from tests.imatrices import METADATA, importances_of, write_dat, write_gguf

pytestmark = pytest.mark.quick

RNG = np.random.default_rng(0)
SUMS = {
    "blk.0.attn_q.weight": (RNG.lognormal(size=(1, 64)).astype("f4"), np.array([3], "f4")),
    "blk.0.ffn_up_exps.weight": (RNG.lognormal(size=(4, 32)).astype("f4"), np.array([7, 0, 2.5, 1 << 25], "f4")),
}
ROUNDED = {name: (values, np.floor(counts + np.float32(0.5))) for name, (values, counts) in SUMS.items()}


def test_the_gguf_form_gives_means_by_expert_and_ones_where_no_token_went(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", SUMS)
    matrix = open_matrix(path)
    wanted = importances_of(ROUNDED)
    assert (matrix.datasets, matrix.chunks, sorted(matrix.sums)) == (("made-up",), 7, sorted(SUMS))
    assert matrix.file.digest == digest_128(path)
    assert np.array_equal(matrix.of("blk.0.attn_q.weight", 64, 1).read(), wanted["blk.0.attn_q.weight"])
    assert np.array_equal(matrix.of("blk.0.ffn_up_exps.weight", 32, 4).read(), wanted["blk.0.ffn_up_exps.weight"])
    one = matrix.of("blk.0.ffn_up_exps.weight", 32, 4, first=2, count=1).read()
    assert np.array_equal(one, wanted["blk.0.ffn_up_exps.weight"][2:3])
    assert matrix.unseen("blk.0.ffn_up_exps.weight") == (1,)
    assert (wanted["blk.0.ffn_up_exps.weight"][1] == 1).all()


def digest_128(path: Path) -> str:
    import xxhash

    assert digest(b"") == xxhash.xxh3_64(b"").hexdigest()
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()


def test_the_old_form_gives_sums_by_calls(tmp_path: Path) -> None:
    matrix = open_matrix(write_dat(tmp_path / "m.dat", SUMS, calls=4))
    wanted = importances_of(SUMS)
    assert (matrix.datasets, matrix.chunks) == (("made-up",), 7)
    assert np.array_equal(matrix.of("blk.0.ffn_up_exps.weight", 32, 4).read(), wanted["blk.0.ffn_up_exps.weight"])
    without = open_matrix(write_dat(tmp_path / "n.dat", SUMS, calls=0, tail=b""))
    assert (without.datasets, without.chunks) == ((), 0)
    assert not without.of("blk.0.attn_q.weight", 64, 1).read().any()  # nothing is divided by no calls


def test_a_block_may_end_within_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BLOCK", 8)
    path = write_dat(tmp_path / "m.dat", SUMS)
    assert open_matrix(path).file.digest == digest_128(path)


def test_the_metadata_is_llama_quantizes(tmp_path: Path) -> None:
    long = {**METADATA, "imatrix.datasets": gguf.texts(["é" * 100])}
    made = open_matrix(write_gguf(tmp_path / "m.gguf", SUMS, long)).metadata
    assert gguf.plain(made) == {
        "quantize.imatrix.file": "m.gguf", "quantize.imatrix.dataset": "é" * 63,
        "quantize.imatrix.entries_count": 2, "quantize.imatrix.chunks_count": 7,
    }  # fmt: skip
    without = {**METADATA, "imatrix.datasets": gguf.texts([]), "imatrix.chunk_count": gguf.uint32(0)}
    assert [*open_matrix(write_gguf(tmp_path / "n.gguf", SUMS, without)).metadata] == [
        "quantize.imatrix.file",
        "quantize.imatrix.entries_count",
    ]


def test_a_file_that_changes_between_planning_and_encoding_is_noticed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", SUMS)
    importance = open_matrix(path).of("blk.0.attn_q.weight", 64, 1)
    write_gguf(path, changed(values=3))
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadCheckpoint, match="m.gguf"):
        importance.read()


def test_a_url_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", SUMS)
    with object_servers.http(tmp_path) as (address, _):
        matrix = open_matrix(address / "m.gguf")
        assert matrix.file.digest == digest_128(path)
        found = matrix.of("blk.0.ffn_up_exps.weight", 32, 4).read()
    assert np.array_equal(found, importances_of(ROUNDED)["blk.0.ffn_up_exps.weight"])


def test_weights_are_loaded_without_one(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match="imatrix: an importance matrix names the tensors of a GGUF, which only a job"):
        load_weights(DEMO, preset("gguf_q4_k_m", imatrix=str(tmp_path / "m.gguf")))


def test_another_size_is_refused_and_named(tmp_path: Path) -> None:
    matrix = open_matrix(write_gguf(tmp_path / "m.gguf", SUMS))
    with pytest.raises(
        BadSpec, match=r"m.gguf: blk.0.attn_q.weight has 64 numbers; the model's has 96 input channels: is"
    ):
        matrix.of("blk.0.attn_q.weight", 96, 1)
    with pytest.raises(BadSpec, match="128 numbers, counted in 4 parts; the model's has 32 .* for each of 8 matrices"):
        matrix.of("blk.0.ffn_up_exps.weight", 32, 8)
    with pytest.raises(BadSpec, match="counted in 4 parts; the model's has 64 input channels for each of 2 matrices"):
        matrix.of("blk.0.ffn_up_exps.weight", 64, 2)


def without(key: str) -> dict[str, gguf.MetadataValue]:
    return {name: value for name, value in METADATA.items() if name != key}


def changed(values: float | None = None, counts: float | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {name: (each.copy(), count.copy()) for name, (each, count) in SUMS.items()}
    if values is not None:
        found["blk.0.ffn_up_exps.weight"][0][3, 9] = values
    if counts is not None:
        found["blk.0.ffn_up_exps.weight"][1][2] = counts
    return found


def renamed(path: Path, one: bytes, other: bytes) -> None:
    raw = path.read_bytes()
    assert one in raw
    assert len(one) == len(other)
    path.write_bytes(raw.replace(one, other, 1))


Damage = Callable[[Path], object]
BAD: dict[str, tuple[Damage, str]] = {
    "another GGUF": (lambda p: write_gguf(p, SUMS, {}), "without imatrix.datasets, imatrix.chunk_count, imatrix.c"),
    "no chunks": (lambda p: write_gguf(p, SUMS, without("imatrix.chunk_count")), "a GGUF without imatrix.chunk_count,"),
    "datasets": (
        lambda p: write_gguf(p, SUMS, {**METADATA, "imatrix.datasets": gguf.text("a")}),
        "imatrix.datasets is no array of texts",
    ),
    "chunks": (
        lambda p: write_gguf(p, SUMS, {**METADATA, "imatrix.chunk_count": gguf.text("a")}),
        "imatrix.chunk_count is no uint32",
    ),
    "nothing": (lambda p: write_gguf(p, {}), "it holds no sums"),
    "NaN": (lambda p: write_gguf(p, changed(np.nan)), r"blk.0.ffn_up_exps.weight: number 105 is NaN or infinite"),
    "infinite": (lambda p: write_gguf(p, changed(np.inf)), "number 105 is NaN or infinite; measure it anew"),
    "NaN counted": (lambda p: write_gguf(p, changed(counts=np.nan)), "ffn_up_exps.weight was counted nan times"),
    "counted less than never": (lambda p: write_gguf(p, changed(counts=-1)), "was counted -1 times; expected a number"),
    "a huge count": (lambda p: write_gguf(p, changed(counts=1e30)), r"was counted 1e\+30 times"),
    "no counts": (
        lambda p: renamed(write_gguf(p, SUMS), b"attn_q.weight.counts", b"attn_q.weight.amount"),
        "blk.0.attn_q.weight has .in_sum2 without .counts",
    ),
    "counts that do not divide": (
        lambda p: write_gguf(p, {"a.weight": (SUMS["blk.0.attn_q.weight"][0], np.ones(1, "f4"))}, METADATA)
        and write_counts(p),
        "a.weight has 64 sums and 3 counts; a count is of as many sums as the others",
    ),
    "truncated": (lambda p: p.write_bytes(write_gguf(p, SUMS).read_bytes()[:-40]), "truncated"),
    "words": (lambda p: p.write_text("no importance matrix, words"), r"and as an old file \(.dat\) it announces 17"),
    "empty": (lambda p: p.write_bytes(b""), "it ends at byte 0"),
    "no entries": (lambda p: p.write_bytes(bytes(8)), "announces 0 tensors; expected 1 to 600000"),
    "many entries": (lambda p: p.write_bytes(struct.pack("<i", 2**31 - 1) + bytes(40)), "announces 2147483647 tens"),
    "dat truncated": (lambda p: p.write_bytes(write_dat(p, SUMS, tail=b"").read_bytes()[:-4]), "128 numbers, and the"),
    "dat cut": (lambda p: p.write_bytes(write_dat(p, SUMS, tail=b"").read_bytes()[:20]), "the name of entry"),
    "dat with a huge size": (
        lambda p: p.write_bytes(struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1)),
        "'a' has 2147483647 numbers",
    ),
    "dat with NaN": (lambda p: write_dat(p, changed(np.nan)), "number 105 is NaN or infinite"),
    "dat twice": (
        lambda p: p.write_bytes(struct.pack("<i", 2) + 2 * struct.pack("<iciif", 1, b"a", 1, 1, 1)),
        "a appears twice",
    ),
    "dat with a long dataset": (lambda p: write_dat(p, SUMS, tail=struct.pack("<ii", 1, 99)), "dataset has 99 bytes"),
    "dat with a name that is no text": (
        lambda p: p.write_bytes(struct.pack("<ii", 1, 1) + b"\xff" + struct.pack("<iif", 1, 1, 1)),
        "a name is no text",
    ),
}  # fmt: skip


def write_counts(path: Path) -> None:
    """Write a matrix whose 64 sums have three counts."""
    sums = {"a.weight": (SUMS["blk.0.attn_q.weight"][0], np.ones(1, "f4"))}
    raw = write_gguf(path, {**sums, "b.weight": (np.ones((3, 64), "f4"), np.ones(3, "f4"))}).read_bytes()
    raw = raw.replace(b"a.weight.counts", b"c.weight.counts").replace(b"b.weight.counts", b"a.weight.counts")
    path.write_bytes(raw.replace(b"b.weight.in_sum2", b"c.weight.in_sum2"))


@pytest.mark.parametrize("case", BAD)
def test_what_is_damaged_is_refused(case: str, tmp_path: Path) -> None:
    make, said = BAD[case]
    make(tmp_path / "m.gguf")
    with pytest.raises(BadCheckpoint, match=said) as raised:
        open_matrix(tmp_path / "m.gguf")
    assert str(raised.value).startswith("m.gguf: no importance matrix that can be used: ")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"imatrix: .*/m.gguf is not there; give the file of an importance matrix"):
        open_matrix(tmp_path / "m.gguf")
