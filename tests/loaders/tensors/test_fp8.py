"""float8 with scales by blocks as a source, held against a decoder written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import ThreadedWork
from loaders.errors import BadCheckpoint
from tests.loaders.tensors.quantized import Q_PROJ, bf16, e4m3_values_once, fp8_tensors, write
from tests.making import Raw, llama_tensors, read_safetensors, values_of
from tests.reading import files_of, tensors_in, values


def blockwise(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """One weight at a time."""
    out = np.empty(codes.shape, np.float32)
    for index in np.ndindex(codes.shape):
        place = (*index[:-2], index[-2] // block[0], index[-1] // block[1])
        out[index] = e4m3_values_once[codes[index]] * np.float32(scales[place])
    return out


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


@pytest.mark.quick
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


@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1)])
@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
def test_a_weight_scale_is_for_rows_or_the_whole(
    method: str, shape: tuple[int, ...], tmp_path: Path, work: ThreadedWork
) -> None:
    codes, _ = fp8_tensors((64, 80), (64, 80))
    scales = np.random.default_rng(1).random(shape).astype(np.float32)
    tensors = {**llama_tensors("F32"), Q_PROJ: Raw("F8_E4M3", codes), Q_PROJ + "_scale": Raw("F32", np.array(scales))}
    for name in ("input_scale", "input_scale_ub"):
        tensors[Q_PROJ.replace("weight", name)] = Raw("F32", np.ones(1, np.float32))
    settings = {"quant_method": method, "activation_scheme": "static", "modules_to_not_convert": ["lm_head"]}
    root = write(tmp_path, tensors, settings, shards=2)
    wanted = e4m3_values_once[codes] * np.asarray(scales).reshape(-1, 1)
    for step in (None, 7, 1000):
        assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work, step), wanted)
    assert not any("scale" in name for name in tensors_in(root))


def test_a_weight_scale_may_be_by_blocks(tmp_path: Path, work: ThreadedWork) -> None:
    codes, scales = fp8_tensors((64, 72), (32, 16))
    tensors = {**llama_tensors("F32"), Q_PROJ: Raw("F8_E4M3", codes), Q_PROJ + "_scale": Raw("F32", scales)}
    root = write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 16]})
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), blockwise(codes, scales, (32, 16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, r"it is quantized, but .*q_proj.weight_scale is missing"),
        ({"weight": None}, r"it is quantized, but .*q_proj.weight is missing"),
        (
            {"weight_scale": Raw("F32", np.ones((1, 64), np.float32))},
            r"expected F32/BF16/F16 \[64, 1\] .* found .*1, 64",
        ),
        ({"weight": Raw("BF16", np.ones((64, 80), np.uint16))}, r"expected an F8_E4M3 matrix, found BF16"),
    ],
)
def test_fbgemms_weights_that_are_not_whole_are_refused(
    change: dict[str, Raw | None], message: str, tmp_path: Path
) -> None:
    codes, _ = fp8_tensors((64, 80), (64, 80))
    found: dict[str, Raw | None] = {
        **llama_tensors("F32"),
        Q_PROJ: Raw("F8_E4M3", codes),
        Q_PROJ + "_scale": Raw("F32", np.ones((64, 1), np.float32)),
    }
    found |= {Q_PROJ.removesuffix("weight") + name: raw for name, raw in change.items()}
    root = write(tmp_path, {n: r for n, r in found.items() if r is not None}, {"quant_method": "fbgemm_fp8"})
    with pytest.raises(BadCheckpoint, match=message):
        tensors_in(root)


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
    tensors = llama_tensors("F32")
    tensors["model.layers.0.mlp.up_proj.weight"] = Raw("F8_E4M3", np.zeros((128, 64), np.uint8))
    root = write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 0]})
    with pytest.raises(BadCheckpoint, match=r"expected a weight_block_size of two positive numbers, found \[128, 0\]"):
        tensors_in(root)


def test_fp8_comes_back_plain_and_quantizes_to_anything(tmp_path: Path, weightmill: Any) -> None:
    root, wanted = fp8_checkpoint(tmp_path / "fp8", shards=3, dtype="BF16")
    plain = weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'plain'}", "quant=none",
                       "quant.dtype=bfloat16", "format=json", "lint=warn")  # fmt: skip
    assert plain.status == 0, plain.err
    from loaders.checkpoints.derived_config import read_config

    config = read_config(files_of(tmp_path / "plain"))
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    found = read_safetensors(tmp_path / "plain")
    assert found[Q_PROJ].dtype == "BF16"
    assert np.array_equal(values_of(found[Q_PROJ]), bf16(wanted))
    for source in ("fp8", "plain"):
        given = f"model.path={tmp_path / source}", f"output.path={tmp_path / source}-nf4", "quant=nf4", "lint=warn"
        ran = weightmill("run", *given)
        assert ran.status == 0, ran.err
    one, other = (read_safetensors(tmp_path / f"{source}-nf4") for source in ("fp8", "plain"))
    assert set(one) == set(other)
    assert all(np.array_equal(one[n].data, other[n].data) for n in one)
    assert weightmill("verify", f"output.path={tmp_path / 'fp8-nf4'}").status == 0
