"""AWQ and GPTQ as sources, held against a decoder written out here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import ThreadedWork
from loaders.errors import BadCheckpoint
from loaders.tensors.logical_tensor import Window
from tests.loaders.tensors.quantized import Q_PROJ, write
from tests.making import AWQ_ORDER, IN_ORDER, Raw, llama_tensors, packed_words
from tests.reading import tensors_in, values


def integers(bits: int, groups: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes (80 inputs, 64 outputs), zeros, float16 scales (4 groups) and the weight (64, 80) that they stand for."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (80, 64))
    zeros = rng.integers(1, 1 << bits, (4, 64))
    scales = (rng.random((4, 64)) * 0.01).astype(np.float16)
    weight = (codes - zeros[groups]).astype(np.float32) * scales[groups].astype(np.float32)
    return codes, zeros, scales, weight.T


def awq_parts(module: str) -> tuple[dict[str, Raw], np.ndarray]:
    codes, zeros, scales, weight = integers(4, np.arange(80) // 24)
    parts = {
        f"{module}.qweight": Raw("I32", packed_words(codes, AWQ_ORDER)),
        f"{module}.qzeros": Raw("I32", packed_words(zeros, AWQ_ORDER)),
        f"{module}.scales": Raw("F16", scales),
    }
    return parts, weight


def gptq_parts(module: str, bits: int, offset: int, index: str) -> tuple[dict[str, Raw], np.ndarray]:
    """`index`: "shuffled" groups, groups in "order", or "none" stored."""
    groups = np.arange(80) // 24
    if index == "shuffled":
        groups = np.random.default_rng(1).permutation(groups)
    codes, zeros, scales, weight = integers(bits, groups)
    parts = {
        f"{module}.qweight": Raw("I32", packed_words(codes.T, IN_ORDER, bits).T),
        f"{module}.qzeros": Raw("I32", packed_words((zeros - offset) % (1 << bits), IN_ORDER, bits)),
        f"{module}.scales": Raw("F16", scales),
        f"{module}.g_idx": Raw("I32", groups.astype(np.int32)),
    }
    return {n: raw for n, raw in parts.items() if index != "none" or not n.endswith("g_idx")}, weight


def without(tensors: Mapping[str, Raw], name: str) -> dict[str, Raw]:
    return {n: raw for n, raw in tensors.items() if n != name}


MODULE = Q_PROJ.removesuffix(".weight")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 24, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "group_size": 24, "desc_act": True, "sym": False}


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("step", [None, 7, 500])
def test_awq_is_code_less_zero_times_scale(step: int | None, tmp_path: Path, work: ThreadedWork) -> None:
    parts, wanted = awq_parts(MODULE)
    root = write(tmp_path, {**without(llama_tensors("F32"), Q_PROJ), **parts}, AWQ, shards=2)
    found = tensors_in(root)
    assert not any(name.endswith(("qweight", "qzeros", "scales")) for name in found)
    assert found[Q_PROJ].role == "attention"
    assert np.array_equal(values(root, found[Q_PROJ], work, step), wanted)


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("step", [None, 7, 500])
@pytest.mark.parametrize("index", ["shuffled", "order", "none"])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_is_code_less_zero_times_scale(
    bits: int, form: str, index: str, step: int | None, tmp_path: Path, work: ThreadedWork
) -> None:
    parts, wanted = gptq_parts(MODULE, bits, int(form == "gptq"), index)
    settings = {**GPTQ, "bits": bits, "checkpoint_format": form}
    root = write(tmp_path, {**without(llama_tensors("F32"), Q_PROJ), **parts}, settings)
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work, step), wanted)


def test_gptq_may_give_each_module_its_bits(tmp_path: Path, work: ThreadedWork) -> None:
    parts, wanted = gptq_parts(MODULE, 8, 1, "order")
    settings = {**GPTQ, "bits": 4, "dynamic": {"+:.*q_proj": {"bits": 8}}}
    root = write(tmp_path, {**without(llama_tensors("F32"), Q_PROJ), **parts}, settings)
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), wanted)


def test_windows_over_gptq_step_and_transpose(tmp_path: Path, work: ThreadedWork) -> None:
    parts, wanted = gptq_parts(MODULE, 4, 1, "shuffled")
    root = write(tmp_path, {**without(llama_tensors("F32"), Q_PROJ), **parts}, {**GPTQ, "bits": 4})
    whole = tensors_in(root)[Q_PROJ]
    for window, shape, cut in (
        (Window(80, (160, 1)), (32, 80), wanted[1::2]),
        (Window(0, (1, 80)), (80, 64), wanted.T),
        (Window(5, (1, 160)), (60, 32), wanted[::2, 5:65].T),
        (Window(800, (80, 1)), (8, 80), wanted[10:18]),
    ):
        tensor = replace(whole, shape=shape, window=window, whole=(64, 80))
        for step in (None, 11, 300):
            assert np.array_equal(values(root, tensor, work, step), cut)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({**AWQ, "version": "gemv"}, {}, r"AWQ version 'gemv' is not decoded; gemm and ipex are"),
        ({**AWQ, "bits": 3}, {}, r"AWQ of 3 bits is not decoded"),
        ({**AWQ, "group_size": 0}, {}, r"expected a group_size of 1 or more, or -1 for whole rows, found 0"),
        (AWQ, {"scales": None}, r"q_proj.weight: it is quantized, but .*q_proj.scales is missing"),
        (AWQ, {"qzeros": None}, r"q_proj.qzeros is missing"),
        (AWQ, {"qweight": None}, r"q_proj.qweight is missing"),
        (
            AWQ,
            {"qweight": Raw("I16", np.ones((80, 8), np.int16))},
            r"qweight: expected I32 \[rows, columns\]",
        ),
        (
            {**AWQ, "group_size": 36},
            {},
            r"qzeros: expected I32 \[3, 8\] for 80 inputs in groups of 36, found",
        ),
        ({**GPTQ, "bits": 4, "checkpoint_format": "marlin"}, {}, r"checkpoint_format 'marlin' is not decoded"),
        ({**GPTQ, "bits": 4}, {"scales": None}, r"q_proj.scales is missing"),
        ({**GPTQ, "bits": 3}, {}, r"q_proj.weight: the settings say 3 bits, but its shapes are those of 4"),
        ({**GPTQ, "bits": 4, "group_size": 36}, {}, r"qzeros: expected I32 \[3, 8\] .* found I32 \[4, 8\]"),
    ],
)
def test_integers_that_are_not_whole_are_refused(
    settings: dict[str, Any], change: dict[str, Raw | None], message: str, tmp_path: Path
) -> None:
    parts = awq_parts(MODULE)[0] if settings["quant_method"] == "awq" else gptq_parts(MODULE, 4, 1, "order")[0]
    tensors = {**without(llama_tensors("F32"), Q_PROJ), **parts, **{f"{MODULE}.{n}": raw for n, raw in change.items()}}
    root = write(tmp_path, {n: raw for n, raw in tensors.items() if raw is not None}, settings)
    with pytest.raises(BadCheckpoint, match=message):
        tensors_in(root)


def test_a_group_that_does_not_exist_is_refused(tmp_path: Path, work: ThreadedWork) -> None:
    parts, _ = gptq_parts(MODULE, 4, 1, "order")
    parts[f"{MODULE}.g_idx"] = Raw("I32", np.full(80, 4, np.int32))
    root = write(tmp_path, {**without(llama_tensors("F32"), Q_PROJ), **parts}, {**GPTQ, "bits": 4})
    with pytest.raises(BadCheckpoint, match=r"q_proj.weight: its g_idx names group 4 of 4"):
        values(root, tensors_in(root)[Q_PROJ], work)
