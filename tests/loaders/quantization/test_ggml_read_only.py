"""Blocks of ggml's types that are only read: decoded as gguf-py decodes them, however they are cut."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loaders.quantization.read_only.ggml as reading
from loaders.backends.threads import ThreadedWork
from loaders.containers import gguf
from loaders.dtypes import DTYPES, GGML_BLOCKS, GGML_READ_BLOCKS
from loaders.errors import BadCheckpoint, BadSpec
from loaders.quantization.schemes.ggml import Ggml
from loaders.specs import StoredSpec, StoredTensor, TensorSpec
from tests.making import read_safetensors
from tests.reading import files_of, tensors_in, values

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


LATER = {"Q1_0", "Q2_0"}  # which gguf-py on PyPI does not have yet


@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - LATER))
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


@pytest.mark.parametrize(("name", "bits", "low", "step"), [("Q1_0", 1, -1, 2), ("Q2_0", 2, -1, 1)])
def test_small_codes_are_multiples_of_a_scale(name: str, bits: int, low: int, step: int) -> None:
    """Codes of a few bits in order, from a byte's lowest on, after a float16 scale."""
    data, numbers = random_blocks(name, 30), BLOCKS[name][0]
    blocks = data.reshape(30, -1)
    found = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(30, numbers, bits)
    codes = (found << np.arange(bits)).sum(axis=2).astype(np.int64)
    out = np.empty(30 * numbers, np.float32)
    reading.decode_blocks(name, data, out)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    assert np.array_equal(out.reshape(30, numbers), (low + step * codes) * scales)


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
    said = "decoding weights of ggml's type IQ2_S needs gguf, which is not installed: pip install 'weightmill[gguf]'"
    assert f"MissingLibrary: {said}" in ran.stderr


def test_a_type_that_the_package_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gguf")
    monkeypatch.delitem(package.quants._type_traits, package.GGMLQuantizationType.IQ2_S)
    with pytest.raises(BadSpec, match="does not decode ggml's type IQ2_S; pip install -U gguf"):
        reading.check_readable("IQ2_S")


def gguf_of(root: Path, architecture: str, tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray]]) -> Path:
    """Write a GGUF of tensors with their types, shapes and bytes."""
    stored = [StoredTensor(name, StoredSpec(DTYPES[kind], shape)) for name, (kind, shape, _) in tensors.items()]
    metadata = {"general.architecture": gguf.text(architecture), "general.file_type": gguf.uint32(26)}
    for key, value in {"expert_count": 3, "attention.head_count": 2, "attention.head_count_kv": 1}.items():
        metadata[f"{architecture}.{key}"] = gguf.uint32(value)
    file = gguf.with_head(gguf.lay_out("m.gguf", stored), metadata)
    data = bytearray(file.size)
    data[: file.header_bytes] = file.about
    for slot in file.slots:
        at = file.header_bytes + slot.offset
        data[at : at + slot.size] = tensors[slot.name][2].tobytes()
    root.mkdir()
    (root / "m.gguf").write_bytes(data)
    return root


def test_scales_beside_blocks_multiply_them(tmp_path: Path, work: ThreadedWork) -> None:
    """NVFP4's: one for a tensor, one for each expert of a stack; those of activations change nothing."""
    rng = np.random.default_rng(0)
    one, each = rng.random(1).astype(np.float32), rng.random(3).astype(np.float32)
    blocks = {"attn_q": random_blocks("NVFP4", 64 * 2), "ffn_up_exps": random_blocks("NVFP4", 3 * 32 * 2)}
    tensors = {
        "blk.0.attn_q.weight": ("NVFP4", (64, 128), blocks["attn_q"]),
        "blk.0.attn_q.scale": ("F32", (1,), one),
        "blk.0.attn_q.input_scale": ("F32", (1,), one),
        "blk.0.ffn_up_exps.weight": ("NVFP4", (3, 32, 128), blocks["ffn_up_exps"]),
        "blk.0.ffn_up_exps.scale": ("F32", (3,), each),
        "blk.0.attn_k.weight": ("Q2_0", (64, 128), random_blocks("Q2_0", 64 * 2)),
    }
    root = gguf_of(tmp_path / "m", "qwen3moe", tensors)
    found = tensors_in(root)
    assert not any("scale" in name for name in found)
    plain = np.empty(64 * 128, np.float32)
    reading.decode_blocks("NVFP4", blocks["attn_q"], plain)
    name = "model.layers.0.self_attn.q_proj.weight"
    for step in (None, 100):
        assert np.array_equal(values(root, found[name], work, step).reshape(-1), plain * one)
    stack = np.empty(3 * 32 * 128, np.float32)
    reading.decode_blocks("NVFP4", blocks["ffn_up_exps"], stack)
    for expert, wanted in enumerate(stack.reshape(3, 32, 128)):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        assert np.array_equal(values(root, found[name], work), wanted * each[expert])


@pytest.mark.parametrize(
    ("kind", "scale", "message"),
    [
        ("NVFP4", np.ones(2, np.float32), r"attn_q.scale: expected F32 \[1\] for .*attn_q.weight, found F32 \[2\]"),
        ("F32", np.ones(1, np.float32), r"attn_q.weight: F32 weights with a blk.0.attn_q.scale are not read"),
    ],
)
def test_scales_that_do_not_fit_are_refused(kind: str, scale: np.ndarray, message: str, tmp_path: Path) -> None:
    data = random_blocks("NVFP4", 128) if kind == "NVFP4" else np.ones((64, 128), np.float32)
    tensors = {"blk.0.attn_q.weight": (kind, (64, 128), data), "blk.0.attn_q.scale": ("F32", scale.shape, scale)}
    root = gguf_of(tmp_path / "m", "qwen3moe", tensors)
    with pytest.raises((BadCheckpoint, BadSpec), match=message):
        tensors_in(root)


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
