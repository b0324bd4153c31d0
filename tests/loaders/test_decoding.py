"""Checkpoints that are already quantized, held against slow decoders written out here."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.backends.threads import ThreadedWork
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint
from loaders.quantization import boxes
from loaders.strategies import loader
from loaders.tensors.logical_tensor import LogicalTensor, Window
from loaders.tensors.sources import tensors_of
from loaders.tensors.views import view_of
from tests.making import LLAMA, TORCH_NAMES, Raw, llama_tensors, read_safetensors, values_of, weights, write_checkpoint
from tests.reference import decode_int8

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def work() -> Iterator[ThreadedWork]:
    with ThreadPoolExecutor(1) as pool:
        yield ThreadedWork(kernels_of("cpu"), pool, threading.Event())


@pytest.fixture(params=[1 << 20, 100], ids=["large boxes", "small boxes"])
def box(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "BOX", request.param)


def tensors_in(root: Path) -> dict[str, LogicalTensor]:
    return {r.name: r for r in tensors_of(open_checkpoint(root), decode=True).tensors}


def values(root: Path, tensor: LogicalTensor, work: ThreadedWork, step: int | None = None) -> np.ndarray:
    """A recipe's values as float32, read `step` at a time."""
    numel = tensor.spec.numel
    with loader("read").open(root, [spec for _, spec in tensor.stored]) as reader:
        view = view_of(tensor, reader, work)
        found = [np.array(view.read(at, min(at + (step or numel), numel))) for at in range(0, numel, step or numel)]
    return values_of(Raw(tensor.dtype.name, np.concatenate(found))).reshape(tensor.shape)


def write(root: Path, tensors: Mapping[str, Raw], block: Mapping[str, Any], shards: int = 1, **config: Any) -> Path:
    dtype = config.pop("dtype", "F32")
    whole = {**LLAMA, "dtype": TORCH_NAMES[dtype], "quantization_config": dict(block), **config}
    return write_checkpoint(root, dict(tensors), config=whole, shards=shards)


def bf16(array: np.ndarray) -> np.ndarray:
    return values_of(weights(array, "BF16"))


def test_what_nothing_here_decodes_is_kept_by_a_copy_and_refused_otherwise(tmp_path: Path, weightmill: Any) -> None:
    root = write(tmp_path / "m", llama_tensors("F32"), {"quant_method": "aqlm"})
    refused = weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'out'}", "quant=nf4")
    assert refused.status == 2
    assert "already quantized (aqlm), which is not decoded here" in refused.err


# --- fp8 by blocks


def e4m3_values() -> np.ndarray:
    """What each of the 256 codes means."""
    table = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        table.append(sign * (np.nan if code & 127 == 127 else value))
    return np.array(table, np.float32)


def blockwise(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """One weight at a time."""
    out = np.empty(codes.shape, np.float32)
    for index in np.ndindex(codes.shape):
        place = (*index[:-2], index[-2] // block[0], index[-1] // block[1])
        out[index] = e4m3_values_once[codes[index]] * np.float32(scales[place])
    return out


e4m3_values_once = e4m3_values()


def fp8_tensors(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 127) == 127] = 0
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return codes, rng.standard_normal(grid).astype(np.float32) * 1e-3


def fp8_checkpoint(root: Path, block: tuple[int, int] = (32, 16), **extra: Any) -> tuple[Path, np.ndarray]:
    """A Llama whose q_proj is float8 in blocks that do not divide it, its scale in another shard."""
    codes, scales = fp8_tensors((64, 72), block)
    tensors = {
        **llama_tensors(extra.get("dtype", "F32")),
        Q_PROJ: Raw("F8_E4M3", codes),
        "a." + Q_PROJ: Raw("U8", np.zeros(1, np.uint8)),
        Q_PROJ + "_scale_inv": Raw("F32", scales),
    }
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    return write(root, tensors, settings, **extra), blockwise(codes, scales, block)


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("step", [None, 7, 100, 1000])
@pytest.mark.parametrize("block", [(32, 16), (48, 40), (128, 128), (1, 1)])
def test_fp8_is_each_code_times_its_blocks_scale(
    block: tuple[int, int], step: int | None, tmp_path: Path, work: ThreadedWork
) -> None:
    root, wanted = fp8_checkpoint(tmp_path, block, shards=3)
    tensor = tensors_in(root)[Q_PROJ]
    assert np.array_equal(values(root, tensor, work, step), wanted)
    assert tensor.role == "attention"
    assert Q_PROJ + "_scale_inv" not in tensors_in(root)


def test_every_code_of_fp8_is_decoded(tmp_path: Path, work: ThreadedWork) -> None:
    tensors = {**llama_tensors("F32"), Q_PROJ: Raw("F8_E4M3", np.arange(256, dtype=np.uint8).reshape(2, 128))}
    tensors[Q_PROJ + "_scale_inv"] = Raw("F32", np.array([[3.0]], np.float32))
    root = write(tmp_path, tensors, {"quant_method": "fp8"})
    found = values(root, tensors_in(root)[Q_PROJ], work).reshape(-1)
    assert np.array_equal(found, e4m3_values_once * np.float32(3), equal_nan=True)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
def test_fp8_scales_may_be_powers_of_two(dtype: str, tmp_path: Path, work: ThreadedWork) -> None:
    codes, _ = fp8_tensors((64, 64), (16, 16))
    powers = np.random.default_rng(0).integers(100, 140, (4, 4)).astype(np.uint8)
    powers[0] = 0, 1, 127, 254
    tensors = {**llama_tensors("F32"), Q_PROJ: Raw("F8_E4M3", codes), Q_PROJ + "_scale_inv": Raw(dtype, powers)}
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"}
    root = write(tmp_path, tensors, settings)
    scales = np.ldexp(1.0, powers.astype(int) - 127)
    with np.errstate(over="ignore"):
        assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), blockwise(codes, scales, (16, 16)))


def test_a_stack_of_fp8_experts_has_scales_for_each(tmp_path: Path, work: ThreadedWork) -> None:
    codes, scales = fp8_tensors((3, 40, 24), (16, 16))
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {**llama_tensors("F32"), name: Raw("F8_E4M3", codes), name + "_scale_inv": Raw("F32", scales)}
    root = write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    assert np.array_equal(values(root, tensors_in(root)[name], work, 101), blockwise(codes, scales, (16, 16)))


def test_fp8_scales_may_be_called_scale_alone(tmp_path: Path, work: ThreadedWork) -> None:
    codes, scales = fp8_tensors((64, 64), (16, 16))
    tensors = {**llama_tensors("F32"), Q_PROJ: Raw("F8_E4M3", codes)}
    tensors[Q_PROJ.replace("weight", "scale")] = Raw("F32", scales)
    root = write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), blockwise(codes, scales, (16, 16)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_may_have_one_scale_a_matrix(shape: tuple[int, ...], tmp_path: Path, work: ThreadedWork) -> None:
    codes, _ = fp8_tensors((64, 64), (64, 64))
    tensors = {**llama_tensors("F32"), Q_PROJ: Raw("F8_E4M3", codes)}
    tensors[Q_PROJ + "_scale_inv"] = Raw("F32", np.full(shape, 0.5, np.float32))
    tensors[Q_PROJ.replace("weight", "activation_scale")] = Raw("F32", np.ones(shape, np.float32))
    root = write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": None})
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), e4m3_values_once[codes] * np.float32(0.5))
    assert not any("activation_scale" in name for name in tensors_in(root))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q_PROJ + "_scale_inv": None}, r"it is quantized, but model.*q_proj.weight_scale_inv is missing"),
        ({Q_PROJ: None}, r"it is quantized, but model.*q_proj.weight is missing"),
        (
            {Q_PROJ + "_scale_inv": Raw("F32", np.ones((2, 4), np.float32))},
            r"expected F32/.* \[2, 5\] for .*q_proj.weight \[64, 72\] in blocks of 32x16, found F32 \[2, 4\]",
        ),
        (
            {Q_PROJ + "_scale_inv": Raw("I64", np.ones((2, 5), np.int64))},
            r"expected F32/BF16/F16/F8_E8M0/U8 \[2, 5\].* found I64",
        ),
        ({Q_PROJ: Raw("BF16", np.ones((64, 72), np.uint16))}, r"expected an F8_E4M3 matrix, found BF16 \[64, 72\]"),
    ],
)
def test_fp8_that_is_not_whole_is_refused(change: dict[str, Raw | None], message: str, tmp_path: Path) -> None:
    root, _ = fp8_checkpoint(tmp_path)
    tensors = {**read_safetensors(root), **change}
    write(tmp_path, {n: raw for n, raw in tensors.items() if raw is not None}, {
        "quant_method": "fp8", "weight_block_size": [32, 16]})  # fmt: skip
    with pytest.raises(BadCheckpoint, match=message):
        tensors_in(root)


def test_a_block_size_that_is_none_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, llama_tensors("F32"), {"quant_method": "fp8", "weight_block_size": [128, 0]})
    with pytest.raises(BadCheckpoint, match=r"expected a weight_block_size of two positive numbers, found \[128, 0\]"):
        tensors_in(root)


def test_fp8_comes_back_plain_and_quantizes_to_anything(tmp_path: Path, weightmill: Any) -> None:
    root, wanted = fp8_checkpoint(tmp_path / "fp8", shards=3, dtype="BF16")
    plain = weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'plain'}", "quant=none",
                       "quant.dtype=bfloat16", "format=json")  # fmt: skip
    assert plain.status == 0, plain.err
    from loaders.checkpoints.derived_config import read_config

    config = read_config(tmp_path / "plain")
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    found = read_safetensors(tmp_path / "plain")
    assert found[Q_PROJ].dtype == "BF16"
    assert np.array_equal(values_of(found[Q_PROJ]), bf16(wanted))
    for source in ("fp8", "plain"):
        ran = weightmill("run", f"model.path={tmp_path / source}", f"output.path={tmp_path / source}-nf4", "quant=nf4")
        assert ran.status == 0, ran.err
    one, other = (read_safetensors(tmp_path / f"{source}-nf4") for source in ("fp8", "plain"))
    assert set(one) == set(other)
    assert all(np.array_equal(one[n].data, other[n].data) for n in one)
    assert weightmill("verify", f"output.path={tmp_path / 'fp8-nf4'}").status == 0


# --- LLM.int8


def test_int8_comes_back_plain(tmp_path: Path, weightmill: Any) -> None:
    root = write_checkpoint(tmp_path / "source")
    assert weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'int8'}", "quant=int8").status == 0
    stored = read_safetensors(tmp_path / "int8")
    wanted = decode_int8(stored, Q_PROJ.removesuffix(".weight"))
    assert weightmill("verify", f"output.path={tmp_path / 'int8'}").status == 0
    plain = weightmill(
        "run",
        f"model.path={tmp_path / 'int8'}",
        f"output.path={tmp_path / 'plain'}",
        "quant=none",
        "quant.dtype=float16",
    )
    assert plain.status == 0, plain.err
    found = read_safetensors(tmp_path / "plain")
    assert set(found) == set(read_safetensors(root))
    assert np.array_equal(values_of(found[Q_PROJ]), values_of(weights(bf16(wanted), "F16")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SCB": None}, r"q_proj.weight: it is quantized, but .*q_proj.SCB is missing"),
        ({"weight": None}, r"it is quantized, but .*q_proj.weight is missing"),
        ({"SCB": Raw("F16", np.ones(64, np.float16))}, r"q_proj.SCB: expected F32 \[64\] .*found F16 \[64\]"),
        ({"SCB": Raw("F32", np.ones(32, np.float32))}, r"q_proj.SCB: expected F32 \[64\] .*found F32 \[32\]"),
        ({"weight_format": Raw("U8", np.array(2, np.uint8))}, r"weight_format: only 0, rows as they are, is read"),
    ],
)
def test_int8_that_is_not_whole_is_refused(change: dict[str, Raw | None], message: str, tmp_path: Path) -> None:
    module = Q_PROJ.removesuffix("weight")
    tensors = {
        **llama_tensors("F32"),
        Q_PROJ: Raw("I8", np.ones((64, 64), np.int8)),
        module + "SCB": Raw("F32", np.ones(64, np.float32)),
        **{module + name: raw for name, raw in change.items()},
    }
    root = write(tmp_path, {n: raw for n, raw in tensors.items() if raw is not None}, {
        "quant_method": "bitsandbytes", "load_in_8bit": True})  # fmt: skip
    with pytest.raises(BadCheckpoint, match=message):
        tensors_in(root)


# --- AWQ and GPTQ


def packed_words(codes: np.ndarray, order: tuple[int, ...], bits: int = 4) -> np.ndarray:
    """Codes along the last dimension, code order[i] of each word at bits i * bits, as int32."""
    each = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), np.uint32)
    for i in range(each):
        words |= codes[..., order[i] :: each].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(16))


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
        ({**GPTQ, "bits": 3}, {}, r"g_idx: expected I32 \[106\] .* found I32 \[80\]"),
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


# --- NVFP4 of ModelOpt

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nvfp4_parts(name: str) -> tuple[dict[str, Raw], np.ndarray]:
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (64, 40), dtype=np.uint8)
    scale, top = rng.integers(1, 127, (64, 5), dtype=np.uint8), np.array(0.003, np.float32)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(64, 80)
    wanted = E2M1[codes] * np.repeat(e4m3_values_once[scale] * top, 16, axis=1)
    parts = {
        name: Raw("U8", packed),
        name + "_scale": Raw("F8_E4M3", scale),
        name + "_scale_2": Raw("F32", top),
        name.replace("weight", "input_scale"): Raw("F32", np.array(1, np.float32)),
    }
    return parts, wanted


def modelopt_checkpoint(root: Path, tensors: Mapping[str, Raw], place: str, algorithm: str = "NVFP4") -> Path:
    settings = {"quant_algo": algorithm, "group_size": 16, "exclude_modules": ["lm_head"]}
    if place == "config.json":
        return write(root, tensors, {"quant_method": "modelopt", **settings})
    write_checkpoint(root, dict(tensors), config={**LLAMA, "dtype": "float32"})
    document = {"producer": {"name": "modelopt"}, "quantization": settings}
    (root / "hf_quant_config.json").write_text(json.dumps(document))
    return root


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("step", [None, 7, 500])
@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_nvfp4_is_code_times_both_scales(place: str, step: int | None, tmp_path: Path, work: ThreadedWork) -> None:
    parts, wanted = nvfp4_parts(Q_PROJ)
    root = modelopt_checkpoint(tmp_path, {**llama_tensors("F32"), **parts}, place)
    found = tensors_in(root)
    assert np.array_equal(values(root, found[Q_PROJ], work, step), wanted)
    assert not any("scale" in name for name in found)


def test_modelopts_fp8_has_one_scale(tmp_path: Path, work: ThreadedWork) -> None:
    codes, _ = fp8_tensors((64, 64), (64, 64))
    tensors = {**llama_tensors("F32"), Q_PROJ: Raw("F8_E4M3", codes)}
    tensors[Q_PROJ + "_scale"] = Raw("F32", np.array(0.25, np.float32))
    root = modelopt_checkpoint(tmp_path, tensors, "config.json", "FP8")
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), e4m3_values_once[codes] * np.float32(0.25))


def test_nvfp4_comes_back_plain_without_its_settings(tmp_path: Path, weightmill: Any) -> None:
    parts, wanted = nvfp4_parts(Q_PROJ)
    root = modelopt_checkpoint(tmp_path / "nvfp4", {**llama_tensors("F32"), **parts}, "hf_quant_config.json")
    ran = weightmill(
        "run", f"model.path={root}", f"output.path={tmp_path / 'out'}", "quant=none", "quant.dtype=bfloat16"
    )
    assert ran.status == 0, ran.err
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert np.array_equal(values_of(read_safetensors(tmp_path / "out")[Q_PROJ]), bf16(wanted))
    copied = weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'copy'}", "quant=none")
    assert copied.status == 0, copied.err
    assert (tmp_path / "copy" / "hf_quant_config.json").exists()


@pytest.mark.parametrize(
    ("algorithm", "change", "message"),
    [
        ("W4A8_AWQ", {}, r"quant_algo 'W4A8_AWQ' in groups of 16 is not decoded; NVFP4 in groups of 16, and FP8, are"),
        ("NVFP4", {"weight_scale": None}, r"q_proj.weight: it is quantized, but .*q_proj.weight_scale is missing"),
        ("NVFP4", {"weight_scale_2": None}, r"q_proj.weight_scale_2 is missing"),
        ("NVFP4", {"weight": None}, r"q_proj.weight is missing"),
        (
            "NVFP4",
            {"weight_scale": Raw("F8_E4M3", np.ones((64, 4), np.uint8))},
            r"weight_scale: expected F8_E4M3 \[64, 5\] .* found F8_E4M3 \[64, 4\]",
        ),
        ("NVFP4", {"weight_scale_2": Raw("F32", np.ones(2, np.float32))}, r"weight_scale_2: expected F32 \[\]"),
        ("NVFP4", {"pre_quant_scale": Raw("F32", np.ones(2, np.float32))}, r"pre_quant_scale: weights smoothed for"),
    ],
)
def test_nvfp4_that_is_not_whole_is_refused(
    algorithm: str, change: dict[str, Raw | None], message: str, tmp_path: Path
) -> None:
    parts, _ = nvfp4_parts(Q_PROJ)
    tensors = {**llama_tensors("F32"), **parts, **{f"{MODULE}.{n}": raw for n, raw in change.items()}}
    whole = {n: raw for n, raw in tensors.items() if raw is not None}
    root = modelopt_checkpoint(tmp_path, whole, "config.json", algorithm)
    with pytest.raises(BadCheckpoint, match=message):
        tensors_in(root)
