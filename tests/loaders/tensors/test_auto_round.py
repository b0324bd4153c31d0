"""AutoRound as a source, held against decoders written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import ThreadedWork
from loaders.errors import BadCheckpoint
from tests.loaders.tensors.quantized import Q_PROJ, e4m3_values_once, fp8_tensors, write
from tests.making import AWQ_ORDER, Raw, llama_tensors, packed_words
from tests.reading import tensors_in, values

MODULE = Q_PROJ.removesuffix(".weight")
BASE = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
GPTQ, AWQ = {"packing_format": "auto_round:auto_gptq"}, {"packing_format": "auto_round:auto_awq"}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Write codes as one stream of bits along the last dimension, in int32 words from the lowest bit on."""
    flat = ((codes[..., None] >> np.arange(bits)) & 1).reshape(*codes.shape[:-1], -1).astype(np.uint8)
    return np.packbits(flat, axis=-1, bitorder="little").view("<i4")


def integers(bits: int, group: int, offset: int, awq: bool = False) -> tuple[dict[str, Raw], np.ndarray]:
    """Parts of a weight (64 outputs, 96 inputs), and its values. A zero may be 2**bits where stored zeros lack one."""
    rng = np.random.default_rng(bits)
    groups = 96 // group
    codes, zeros = rng.integers(0, 1 << bits, (96, 64)), rng.integers(0, 1 << bits, (groups, 64))
    scales = (rng.random((groups, 64)) * 0.01).astype(np.float16)
    weight = (codes - np.repeat(zeros + offset, group, 0)).astype(np.float32) * np.repeat(scales, group, 0)
    words = packed_words(codes, AWQ_ORDER) if awq else stream(codes.T, bits).T
    parts = {
        f"{MODULE}.qweight": Raw("I32", np.ascontiguousarray(words)),
        f"{MODULE}.qzeros": Raw("I32", packed_words(zeros, AWQ_ORDER) if awq else stream(zeros, bits)),
        f"{MODULE}.scales": Raw("F16", scales),
    }
    return parts, weight.T


def checkpoint(root: Path, parts: dict[str, Raw], **settings: Any) -> Path:
    plain = {name: raw for name, raw in llama_tensors("F32").items() if name != Q_PROJ}
    return write(root, {**plain, **parts}, {**BASE, **settings}, shards=2)


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("step", [None, 7, 500])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 96), (5, 32), (8, 48)])
@pytest.mark.parametrize(("said", "offset"), [("auto_round:auto_gptq", 1), ("auto_round", 0)])
def test_words_are_code_less_zero_times_scale(
    said: str, offset: int, bits: int, group: int, step: int | None, tmp_path: Path, work: ThreadedWork
) -> None:
    parts, wanted = integers(bits, group, offset)
    size = -1 if group == 96 else group
    root = checkpoint(tmp_path, parts, bits=bits, group_size=size, packing_format=said, autoround_version="0.9")
    found = tensors_in(root)
    assert np.array_equal(values(root, found[Q_PROJ], work, step), wanted)
    assert not any(name.endswith(("qweight", "qzeros", "scales")) for name in found)


@pytest.mark.parametrize(
    ("settings", "offset"),
    [
        ({}, 1),  # transformers' default is auto_round:gptq
        ({"backend": "auto_round:gptq:exllamav2"}, 1),
        ({"backend": "auto_round:exllamav2"}, 0),
        ({"packing_format": "auto_round:gptqmodel"}, 0),
        ({"packing_format": "auto_round:auto_gptq", "backend": "auto_round:exllamav2"}, 1),
        ({"quant_method": "intel/auto-round", "backend": "gptq:exllamav2"}, 1),
    ],
)
def test_each_version_says_what_zeros_are(
    settings: dict[str, Any], offset: int, tmp_path: Path, work: ThreadedWork
) -> None:
    parts, wanted = integers(4, 32, offset)
    root = checkpoint(tmp_path, parts, **settings)
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), wanted)


def test_awqs_words_are_decoded(tmp_path: Path, work: ThreadedWork) -> None:
    parts, wanted = integers(4, 32, 0, awq=True)
    root = checkpoint(tmp_path, parts, **AWQ)
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), wanted)


@pytest.mark.parametrize("key", [MODULE, r".*self_attn\.q_proj.*", MODULE.replace("model.", "model.language_model.")])
def test_modules_may_have_settings_of_their_own(key: str, tmp_path: Path, work: ThreadedWork) -> None:
    parts, wanted = integers(8, 48, 1)
    extra = {key: {"bits": 8, "group_size": 48}, "model.layers.0.mlp.up_proj": {"bits": 16, "data_type": "float"}}
    blocks = {"block_name_to_quantize": "model.language_model.layers"}
    root = checkpoint(tmp_path, parts, **GPTQ, **blocks, extra_config=extra)
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), wanted)


def test_what_is_said_of_a_tower_holds_for_the_tower_alone(tmp_path: Path, work: ThreadedWork) -> None:
    parts, wanted = integers(4, 32, 1)
    tower = "vision." + MODULE.removeprefix("model.")
    parts[f"{tower}.weight"] = llama_tensors("F32")[Q_PROJ]
    root = checkpoint(tmp_path, parts, **GPTQ, extra_config={tower: {"bits": 16, "data_type": "float"}})
    found = tensors_in(root)
    assert np.array_equal(values(root, found[Q_PROJ], work), wanted)
    assert found[f"{tower}.weight"].decode is None


def test_nvfp4_and_mxfp4_are_those_of_compressed_tensors(tmp_path: Path, work: ThreadedWork) -> None:
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (64, 32), dtype=np.uint8)
    codes = E2M1[np.stack([packed & 15, packed >> 4], axis=-1).reshape(64, 64)]
    small, powers = rng.integers(1, 127, (64, 4), dtype=np.uint8), rng.integers(100, 130, (64, 2), dtype=np.uint8)
    top = np.array([3.0], np.float32)
    forms = {
        "nv_fp": (
            {"weight_scale": Raw("F8_E4M3", small), "weight_global_scale": Raw("F32", top)},
            codes * np.repeat(e4m3_values_once[small] / top, 16, axis=1),
        ),
        "mx_fp": ({"weight_scale": Raw("U8", powers)}, codes * np.repeat(np.exp2(powers - 127.0), 32, axis=1)),
    }
    for name, (scales, wanted) in forms.items():
        parts = {f"{MODULE}.weight_packed": Raw("U8", packed)} | {f"{MODULE}.{n}": raw for n, raw in scales.items()}
        parts[f"{MODULE}.input_global_scale"] = Raw("F32", top)
        settings = {"packing_format": "auto_round:llm_compressor", "data_type": name, "act_bits": 4}
        root = checkpoint(tmp_path / name, {n: r for n, r in parts.items() if name == "nv_fp" or "input" not in n},
                          **settings)  # fmt: skip
        found = values(root, tensors_in(root)[Q_PROJ], work)
        assert np.array_equal(found, wanted.astype(np.float32)), name


@pytest.mark.parametrize("form", ["mxfp8", "rows", "flat rows", "one"])
def test_eight_bit_floats(form: str, tmp_path: Path, work: ThreadedWork) -> None:
    codes, _ = fp8_tensors((64, 64), (64, 64))
    rng = np.random.default_rng(0)
    powers = rng.integers(100, 130, (64, 2), dtype=np.uint8)
    shape = {"rows": (64, 1), "flat rows": (64,), "one": (1,), "mxfp8": (64, 1)}[form]
    scales = rng.random(shape).astype(np.float32)
    wanted = e4m3_values_once[codes] * scales.reshape(-1, 1)
    if form == "mxfp8":
        wanted = e4m3_values_once[codes] * np.repeat(np.exp2(powers - 127.0), 32, axis=1)
    parts = {
        Q_PROJ: Raw("F8_E4M3", codes),
        Q_PROJ + "_scale": Raw("U8", powers) if form == "mxfp8" else Raw("F32", scales),
        f"{MODULE}.input_scale": Raw("F32", np.ones(1, np.float32)),
    }
    said = "auto_round:llm_compressor" if form == "mxfp8" else "auto_round:fp8_static"
    root = checkpoint(tmp_path, parts, packing_format=said, bits=8, data_type="fp8", act_bits=8)
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), wanted.astype(np.float32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"packing_format": "auto_round:marlin"},
            r"packing_format 'auto_round:marlin' is not decoded; auto_round",
        ),
        ({"packing_format": "auto_round:llm_compressor_nvfp4_e5m3"}, r"'auto_round:llm_compressor_nvfp4_e5m3' is not"),
        ({"packing_format": ["a"]}, "expected a text as quantization_config.packing_format, found a list of 1"),
        ({**GPTQ, "bits": 2}, r"q_proj.weight: the settings say 2 bits, but its shapes are those of 4"),
        ({**GPTQ, "group_size": 64}, r"expected I32 \[2, 8\] for .* groups of 64"),
        ({**GPTQ, "data_type": "mx_int4"}, r"data_type 'mx_int4' is not decoded as gptq; int is"),
        ({**GPTQ, "rotation_config": {"size": 32}}, r"AutoRound's rotation_config: the weights are rotated"),
        ({**GPTQ, "extra_config": {MODULE: {"bits": 16}}}, r"q_proj: AutoRound's extra_config says that it is plain"),
        (
            {**GPTQ, "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}},
            r"up_proj: AutoRound's extra_config says how it is quantized, but it is stored plain",
        ),
        ({**GPTQ, "extra_config": ["a"]}, "expected an object as quantization_config.extra_config, found a list of 1"),
        ({**GPTQ, "block_name_to_quantize": "transformer.h"}, r"names 'transformer.h', where nothing is stored"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts, _ = integers(4, 32, 1)
    root = checkpoint(tmp_path, parts, **settings)
    with pytest.raises(BadCheckpoint, match=message):
        tensors_in(root)
