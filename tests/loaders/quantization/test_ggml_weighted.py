"""ggml's types by an importance matrix: golden bytes, which are ggml's, and what is true of all of them.

The goldens are held against ggml itself by tests/parity/test_imatrix.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import loaders.backends.threads
from loaders.backends.threads import ThreadedWork
from loaders.dtypes import DTYPES
from loaders.quantization.kernels.ggml.weighted import encode_weighted
from loaders.quantization.schemes.ggml import WEIGHTED, Ggml
from loaders.storage.hashes import digest
from tests.encoding import DTYPE_NAMES, MemoryView, encode, random
from tests.making import values_of, weights

# xxh3-64 of `golden_values` by `golden_importance`, as ggml_quantize_chunk of llama.cpp 0.5 encodes them
GOLDENS: dict[str, str] = {
    "Q4_0": "d3ea24b54ea10bd9", "Q4_1": "6aede35d694392c4", "Q5_0": "8a8cc177e2fe59ad",
    "Q5_1": "60fa76a7a745d05d", "Q2_K": "73b443569a24ba7e", "Q3_K": "66d2bef312cb46d0",
    "Q4_K": "69cc4e663535012f", "Q5_K": "0d23cde8aaa2a705", "Q6_K": "b0a1134fc4fba785",
    "IQ4_NL": "95d4c1a02939c721", "IQ4_XS": "60b83df39503911f",
}  # fmt: skip


def integers(seed: int, count: int) -> np.ndarray:
    """Numbers from 0 to 2^24, the same everywhere: a linear congruential generator."""
    found, state = np.empty(count, np.int64), seed
    for index in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found[index] = state >> 40
    return found


def golden_values() -> np.ndarray:
    """Rows (12, 512) like those of a model, some of them awkward."""
    sums = integers(1, 12 * 512 * 3).reshape(3, 12, 512).sum(0) - 3 * 2**23
    values = (sums / 2**24).astype(np.float32)
    values[1], values[2, :64], values[3] = 0, 0, np.abs(values[3])
    values[4], values[5] = 1.5, np.round(values[5] * 4)
    values[6, ::7] *= 1000
    values[7] *= np.float32(2**-60)
    return values


def golden_importance() -> np.ndarray:
    """Two matrices' importances (2, 512), of which a third is zero, and some are large."""
    found = (integers(2, 2 * 512).reshape(2, 512) % 1000).astype(np.float32) / 64
    found[:, ::3] = 0
    found[1, 5::11] *= 1000
    return found


@pytest.mark.parametrize("name", WEIGHTED)
def test_blocks_are_ggmls(name: str) -> None:
    values, importance = golden_values(), golden_importance()
    out = np.empty(DTYPES[name].size(values.shape), np.uint8)
    encode_weighted(values.reshape(-1), "F32", name, 0, 6, importance, out)
    assert digest(out) == GOLDENS[name]


def test_every_type_has_a_golden() -> None:
    assert {*GOLDENS} == {*WEIGHTED}


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("name", WEIGHTED)
def test_the_bytes_do_not_depend_on_how_a_tensor_is_cut(
    name: str, dtype: str, work: ThreadedWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, found = random((2, 5, 512), dtype), []
    scheme = replace(Ggml(name, is_weighted=True), importance=golden_importance())
    for step in (1 << 21, 1100, 1):
        monkeypatch.setattr(loaders.backends.threads, "RANGE", step)
        sink, error = encode(scheme, raw, work)
        found.append(sink.as_bytes())
        assert error.relative_error <= scheme.error_limit
        assert not error.wrong
    assert found[0] == found[1] == found[2]
    # a stack's matrices are those that they would be alone
    for index in range(2):
        one = weights(values_of(raw)[index], dtype)
        sink, _ = encode(replace(scheme, importance=golden_importance()[index : index + 1]), one, work)
        alone = sink.as_bytes()["weight"]
        assert found[0]["weight"][index * len(alone) : (index + 1) * len(alone)] == alone


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0"])
def test_errors_are_less_where_they_count_more(name: str, work: ThreadedWork) -> None:
    values = values_of(random((64, 512), "F32"))
    importance = np.ones((1, 512), np.float32)
    importance[0, ::4] = 50
    errors = []
    for scheme in (Ggml(name), replace(Ggml(name, is_weighted=True), importance=importance)):
        raw = weights(values, "F32")
        sink, _ = encode(scheme, raw, work)
        out = np.empty(values.size, np.float32)
        scheme.decode(MemoryView(raw).spec, sink, 0, values.size, out, work)
        errors.append(((out.reshape(values.shape) - values) ** 2)[:, ::4].sum())
    assert errors[1] < 0.9 * errors[0]


def test_a_weighted_type_is_encoded_on_the_cpu_alone() -> None:
    for name in WEIGHTED:
        scheme = Ggml(name, is_weighted=True)
        assert (scheme.backends, scheme.searched_on) == (("cpu",), ())
