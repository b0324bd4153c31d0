"""Blocks of ggml's types that are only read: decoded as gguf-py decodes them, however they are cut."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loaders.quantization.read_only.ggml as reading
from loaders.containers import gguf
from loaders.dtypes import DTYPES, GGML_BLOCKS, GGML_READ_BLOCKS
from loaders.errors import BadSpec
from loaders.quantization.schemes.ggml import Ggml
from loaders.specs import StoredSpec, StoredTensor, TensorSpec
from tests.making import read_safetensors
from tests.reading import files_of

BLOCKS = GGML_BLOCKS | GGML_READ_BLOCKS
# where a block keeps its float16 scales; IQ1_M spreads its one over the top bits of the last four words
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "Q4_1": (0, 2),
          "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "MXFP4": (), "NVFP4": (), "IQ1_M": ()}  # fmt: skip


def random_blocks(name: str, count: int) -> np.ndarray:
    """Any bytes, with scales that are ordinary numbers."""
    rng = np.random.default_rng(11)
    blocks = rng.integers(0, 256, (count, BLOCKS[name][1]), np.uint8)
    for at in SCALES.get(name, (0,)):
        blocks[:, at : at + 2] = rng.standard_normal(count).astype(np.float16).view(np.uint8).reshape(count, 2)
    if name == "IQ1_M":
        blocks[:, 55] = blocks[:, 55] & 0x0F | 0x20
    if name == "NVFP4":
        blocks[:, :4] &= 0x77  # unsigned e4m3: no sign, no NaN
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(100, 140, count)
    return blocks.reshape(-1)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks_decode_as_gguf_py_decodes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quants = pytest.importorskip("gguf.quants")
    data, found = random_blocks(name, 30), []
    theirs = quants.dequantize(data, quants.GGMLQuantizationType[name]).reshape(-1)
    for numbers in (1 << 16, 512):
        monkeypatch.setattr(reading, "NUMBERS", numbers)
        out = np.empty(30 * BLOCKS[name][0], np.float32)
        reading.decode_blocks(name, data, out)
        found.append(out)
    assert np.isfinite(theirs).all()
    assert all(np.array_equal(out, theirs) for out in found)


def test_a_block_by_hand() -> None:
    """IQ4_NL: a float16 scale, and sixteen bytes of indexes into a table of sixteen."""
    pytest.importorskip("gguf")
    out = np.empty(32, np.float32)
    block = np.concatenate([np.array([0.5], np.float16).view(np.uint8), np.arange(16, dtype=np.uint8) * 16])
    reading.decode_blocks("IQ4_NL", block, out)
    table = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    assert out.tolist() == [-63.5] * 16 + [number / 2 for number in table]


@pytest.mark.parametrize("name", sorted(GGML_READ_BLOCKS))
def test_they_are_not_written(name: str) -> None:
    refusal = Ggml(name).refuses(TensorSpec("w", DTYPES["F32"], (2, 256)))
    assert refusal is not None
    assert "is read, not written" in refusal


def test_without_the_gguf_package_they_are_refused() -> None:
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from loaders.quantization.read_only.ggml import check_readable\n"
        "check_readable('Q4_K')\n"
        "check_readable('IQ2_S')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BadSpec: weights of ggml's type IQ2_S are decoded with the gguf package; pip install gguf" in ran.stderr


def test_a_type_that_the_package_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gguf")
    monkeypatch.delitem(package.quants._type_traits, package.GGMLQuantizationType.IQ2_S)
    with pytest.raises(BadSpec, match="does not decode ggml's type IQ2_S; pip install -U gguf"):
        reading.check_readable("IQ2_S")


def test_a_gguf_of_such_blocks_is_a_source(weightmill: Any, tmp_path: Path) -> None:
    """Copied as it is, decoded to a checkpoint of transformers, and quantized again."""
    quants = pytest.importorskip("gguf.quants")
    names = {"token_embd.weight": "IQ3_S", "blk.0.attn_v.weight": "IQ2_XXS", "blk.0.ffn_down.weight": "IQ4_XS"}
    tensors = [StoredTensor(name, StoredSpec(DTYPES[kind], (8, 256))) for name, kind in names.items()]
    metadata = {"general.architecture": gguf.text("qwen2"), "general.file_type": gguf.uint32(26)}
    file = gguf.with_head(gguf.lay_out("m.gguf", tensors), metadata)
    data = bytearray(file.size)
    data[: file.header_bytes] = file.about
    blocks = {name: random_blocks(kind, 8) for name, kind in names.items()}
    for slot in file.slots:
        at = file.header_bytes + slot.offset
        data[at : at + slot.size] = blocks[slot.name].tobytes()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "m.gguf").write_bytes(data)

    def run(out: str, *settings: str) -> None:
        given = f"model.path={tmp_path / 'm'}", f"output.path={tmp_path / out}", "lint=warn"
        ran = weightmill("run", *given, *settings)
        assert ran.status == 0, ran.err

    run("copy", "quant=none", "output=gguf")
    [copy] = (tmp_path / "copy").glob("*.gguf")
    assert copy.read_bytes() == bytes(data)
    run("plain", "quant=none", "quant.dtype=float32")
    found = read_safetensors(tmp_path / "plain")["model.layers.0.mlp.down_proj.weight"].data
    kind = quants.GGMLQuantizationType.IQ4_XS
    assert np.array_equal(found.reshape(-1), quants.dequantize(blocks["blk.0.ffn_down.weight"], kind).reshape(-1))
    run("again", "quant=none", "quant.dtype=float16", "output=gguf")
    assert {s.dtype.name for s in gguf.read_specs(files_of(tmp_path / "again"), "m-F16.gguf")} == {"F16"}
