"""Held against llama.cpp: blocks and whole models that are quantized by an importance matrix.

llama.cpp comes as llama-cpp-python, whose llama_model_quantize is given importances. What llama-quantize itself makes
of a file, counts of zero among it, is judged where WEIGHTMILL_LLAMA_QUANTIZE names its program, which no wheel has: it
is built from llama.cpp's sources of that version (cmake -DLLAMA_BUILD_TOOLS=ON -DGGML_NATIVE=OFF, target
llama-quantize).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.containers import gguf
from loaders.dtypes import DTYPES
from loaders.quantization.kernels.ggml.weighted import encode_weighted
from loaders.quantization.schemes.ggml import WEIGHTED
from tests.imatrices import importances_of, sums_of, write_dat, write_gguf
from tests.llama_log import errors, listening
from tests.parity.test_llama_cpp import FILE_TYPES, awkward, llama_cpp, made, metadata_of, sources, tensors_of

__all__ = ["sources"]  # a fixture
pytestmark = pytest.mark.engine
PROGRAM = "WEIGHTMILL_LLAMA_QUANTIZE"

TYPES = {**FILE_TYPES, "Q2_K_S": 21}


# --- blocks


def importance(kind: str, columns: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    found = rng.lognormal(0, 12 if kind == "wide" else 1.5, columns).astype(np.float32)
    if kind in ("zeroed", "few"):
        found[rng.random(columns) < (1 / 3 if kind == "zeroed" else 0.97)] = 0
    return found if kind != "none" else np.zeros(columns, np.float32)


def ggml_bytes(name: str, values: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """What ggml_quantize_chunk makes of float32 rows and their channels' importances."""
    [library] = Path(llama_cpp.__file__).parent.rglob("libggml-base.so")
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    out = np.zeros(DTYPES[name].size(values.shape), np.uint8)
    given = values.ctypes.data, out.ctypes.data, 0, *values.shape, importance.ctypes.data
    quantize(gguf.TYPE_IDS[name], *given)
    return out


@pytest.mark.parametrize("name", WEIGHTED)
def test_blocks_are_those_of_ggml(name: str) -> None:
    rng = np.random.default_rng(4)
    drawn = [rng.standard_normal((24, 512)), rng.standard_t(2, (24, 512)), np.round(rng.standard_normal((24, 512)) * 3)]
    values = np.concatenate([awkward(), *drawn]).astype(np.float32)
    out = np.empty(DTYPES[name].size(values.shape), np.uint8)
    for kind in ("full", "zeroed", "few", "none", "wide"):
        weights = importance(kind, values.shape[1])
        encode_weighted(values.reshape(-1), "F32", name, 0, len(values), weights[None], out)
        assert np.array_equal(out, ggml_bytes(name, values, weights)), kind


# --- whole models


def quantize_by(base: Path, out: Path, file_type: str, importances: dict[str, np.ndarray], **params: Any) -> None:
    given = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(importances) + 1))()
    for entry, (name, values) in zip(given, importances.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = TYPES[file_type], 1
    settings.imatrix = ctypes.cast(given, type(settings.imatrix))
    for key, value in params.items():
        setattr(settings, key, value)
    with listening() as said:
        status = llama_cpp.llama_model_quantize(str(base).encode(), str(out).encode(), ctypes.byref(settings))
    assert status == 0, errors(said)


# Each type that takes importances, each kind of matrix, and dense models, odd sizes and mixtures; every combination of
# them, which takes half an hour, where PROGRAM is given.
CASES = [
    ("llama untied", "Q2_K_S", "full"), ("llama untied", "Q3_K_S", "zeroed"), ("llama untied", "Q4_0", "partial"),
    ("llama odd", "Q4_K_M", "zeroed"), ("llama odd", "Q5_K_M", "full"), ("llama tied", "Q5_1", "zeroed"),
    ("mixtral", "Q3_K_L", "partial"), ("mixtral", "Q5_0", "unseen"), ("qwen3 moe", "Q6_K", "unseen"),
    ("llama untied", "IQ4_XS", "partial"), ("mixtral", "IQ4_NL", "unseen"), ("llama odd", "IQ4_XS", "zeroed"),
    ("qwen3 moe", "Q4_K_S", "full"), *((m, "Q2_K_S", "full") for m in ("llama tied", "llama odd", "qwen3 moe")),
]  # fmt: skip
ALL = [
    (model, file_type, kind)
    for model in ("llama untied", "llama odd", "mixtral", "qwen3 moe")
    for file_type in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S",
                      "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS")
    for kind in ("full", "partial", "zeroed", "unseen")
    if not (file_type == "Q2_K_S" and kind == "partial")
]  # fmt: skip


@pytest.mark.parametrize(("model", "file_type", "kind"), CASES if PROGRAM not in os.environ else ALL)
def test_a_model_is_quantized_by_importances_as_llama_cpp_does(
    model: str, file_type: str, kind: str, sources: Callable[[str], Path], weightmill: Any, tmp_path: Path
) -> None:
    base = made(weightmill, sources(model), tmp_path / "base", "quant=gguf_bf16")
    sums = sums_of(tensors_of(base), kind)
    matrix = write_gguf(tmp_path / "m.gguf", sums)
    quantize_by(base, tmp_path / "theirs.gguf", file_type, importances_of(sums))
    settings = "quant=gguf_q8_0", f"quant.file_type={file_type}", f"quant.imatrix={matrix}"
    ours = made(weightmill, sources(model), tmp_path / "out", *settings)
    one, other = tensors_of(ours), tensors_of(tmp_path / "theirs.gguf")
    assert {n: t[:2] for n, t in one.items()} == {n: t[:2] for n, t in other.items()}
    assert [name for name in one if one[name] != other[name]] == []
    # and from the GGUF, whose experts are one tensor
    assert tensors_of(made(weightmill, base.parent, tmp_path / "again", *settings)) == one


def test_a_pure_mix_by_importances_is_llama_cpps(sources: Any, weightmill: Any, tmp_path: Path) -> None:
    base = made(weightmill, sources("llama odd"), tmp_path / "base", "quant=gguf_bf16")
    sums = sums_of(tensors_of(base), "full")
    quantize_by(base, tmp_path / "theirs.gguf", "Q3_K_M", importances_of(sums), pure=True)
    ours = made(weightmill, base.parent, tmp_path / "out", "quant=gguf_q3_k_m", "quant.pure=true",
                f"quant.imatrix={write_gguf(tmp_path / 'm.gguf', sums)}")  # fmt: skip
    assert tensors_of(ours) == tensors_of(tmp_path / "theirs.gguf")


@pytest.mark.parametrize("form", ["gguf", "dat"])
@pytest.mark.skipif(PROGRAM not in os.environ, reason=f"{PROGRAM} names no llama-quantize")
@pytest.mark.parametrize(
    ("model", "kind"), [("qwen3 moe", "unseen"), ("mixtral", "partial"), ("llama untied", "zeroed")]
)
def test_a_file_is_what_llama_quantize_takes_it_for(
    model: str, kind: str, form: str, sources: Any, weightmill: Any, tmp_path: Path
) -> None:
    base = made(weightmill, sources(model), tmp_path / "base", "quant=gguf_bf16")
    sums = sums_of(tensors_of(base), kind)
    matrix = write_gguf(tmp_path / "m.gguf", sums) if form == "gguf" else write_dat(tmp_path / "m.dat", sums)
    theirs = tmp_path / "theirs.gguf"
    subprocess.run(
        [os.environ[PROGRAM], "--imatrix", matrix.name, base, theirs, "Q4_K_M", "1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    ours = made(weightmill, sources(model), tmp_path / "out", "quant=gguf_q4_k_m", f"quant.imatrix={matrix}")
    assert tensors_of(ours) == tensors_of(theirs)
    assert metadata_of(ours) == metadata_of(theirs)
