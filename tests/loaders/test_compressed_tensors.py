"""compressed-tensors without the library: golden bytes, the form for bfloat16, targets, damage, refusals, lint."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.backends.threads import ThreadedWork
from loaders.checkpoints.derived_config import read_config
from loaders.dtypes import DTYPES
from loaders.layouts.compressed_tensors import targets_of
from loaders.quantization.kernels.lanes import host_has
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedMxfp4, CompressedNvfp4
from loaders.quantization.schemes.compressed_tensors_fp8_block import Fp8Block
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.quantization.schemes.compressed_tensors_rowwise import RowScaled
from loaders.rules.rule import Decision, Rule
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor
from tests import reference
from tests.loaders.test_schemes import MemorySink, MemoryView, decode
from tests.making import (
    LLAMA,
    Raw,
    llama_tensors,
    read_safetensors,
    values_of,
    weights,
    write_checkpoint,
    write_moe,
    write_safetensors,
)

ROOT = Path(__file__).resolve().parents[2]
SCHEMES: dict[str, Scheme] = {
    "w4a16": PackedInt(4, 32),
    "w8a16": PackedInt(8, 32),
    "w4a16_asym": PackedInt(4, 32, symmetric=False),
    "fp8_dynamic": RowScaled("float"),
    "w8a8": RowScaled("int"),
    "fp8_block": Fp8Block(),
    "nvfp4a16": CompressedNvfp4(),
    "mxfp4a16": CompressedMxfp4(),
}


def encode(scheme: Scheme, raw: Raw) -> MemorySink:
    view = MemoryView(raw)
    sink = MemorySink(scheme, view.spec)
    with ThreadPoolExecutor(1) as pool:
        scheme.encode(view, sink, ThreadedWork(kernels_of("cpu"), pool, threading.Event()))
    return sink


# --- bytes


def results() -> dict[str, bytes]:
    """Everything stored and decoded of awkward weights, by scheme and dtype."""
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((40, 256)) * 0.02).astype(np.float32)
    for row, factor in enumerate((0, -0.0, 1e-30, 1e-36, 1e-43, 1e-38, 1e-5, 1e-7, 1e4)):
        rows[row] *= np.float32(factor)
    rows[9] = np.linspace(-7.5, 7.5, 256)
    rows[10] = np.arange(256) - 3
    rows[11] = 0.01
    found = {}
    for name, scheme in SCHEMES.items():
        for dtype in ("BF16", "F16", "F32"):
            raw = weights(rows, dtype)
            sink = encode(scheme, raw)
            with ThreadPoolExecutor(1) as pool:
                work = ThreadedWork(kernels_of("cpu"), pool, threading.Event())
                decoded = decode(scheme, raw, sink, work).tobytes()
            found[f"{name} {dtype}"] = b"".join(data for _, data in sorted(sink.as_bytes().items())) + decoded
    return found


def test_a_plain_cpu_gives_the_same_bytes(tmp_path: Path) -> None:
    """A process told that its CPU has nothing beyond the baseline (SSE2, NEON) takes the portable forms."""
    code = (
        "import sys, pickle; from tests.loaders.test_compressed_tensors import results, host_has;"
        "assert not host_has('avx2'); sys.stdout.buffer.write(pickle.dumps(results()))"
    )
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    plain, here = pickle.loads(ran.stdout), results()
    assert [name for name in here if here[name] != plain[name]] == []
    assert callable(host_has)


def bf16(values: np.ndarray) -> np.ndarray:
    return values_of(weights(values, "BF16"))


@pytest.mark.parametrize("exponent", [-99, -30, 0, 30])
def test_a_product_stands_for_every_quotient_of_bfloat16s(exponent: int) -> None:
    """All mantissas of the largest weight by all of the others', over eleven binades, by row: E4M3 and integers."""
    mantissas = (1 + np.arange(128, dtype=np.float32) / 128) * np.float32(2.0**exponent)
    others = np.concatenate([(1 + np.arange(128, dtype=np.float32) / 128) * np.float32(2.0**-e) for e in range(1, 12)])
    values = np.stack([np.append(top, others * np.float32(2.0**exponent)) for top in mantissas])
    values[:, 1::3] *= -1
    raw = weights(values, "BF16")
    for kind, divisor in (("float", 448), ("int", 127.5)):
        scales = bf16(values[:, :1] / np.float32(divisor))
        quotients = bf16(values / scales)
        sink = encode(RowScaled(kind), raw)  # type: ignore[arg-type]
        assert np.array_equal(sink.stored["weight_scale"], weights(scales, "BF16").data.reshape(-1))
        codes = sink.stored["weight"].reshape(values.shape)
        if kind == "int":
            assert np.array_equal(codes.view(np.int8), np.clip(np.rint(quotients), -128, 127).astype(np.int8))
        else:
            table = reference.e4m3(np.arange(127))
            nearest = np.abs(np.clip(np.abs(quotients), 0, 448)[..., None] - table)
            best = nearest.min(-1, keepdims=True)
            even = np.where(nearest == best, np.arange(127) % 2, 2).argmin(-1)  # of two as near, the even code
            assert np.array_equal(codes & 0x7F, even)
            assert np.array_equal(codes >> 7, quotients < 0)


def test_scales_that_are_too_small_or_large_for_the_product_are_divided_by() -> None:
    rng = np.random.default_rng(5)
    for scale in (1e-37, 1e-33, 1e-31, 1e31, 1e33, 1e36):
        values = bf16((rng.standard_normal((4, 64)) * scale).astype(np.float32))
        scales = bf16(np.abs(values).max(1, keepdims=True) / np.float32(127.5))
        codes = encode(RowScaled("int"), weights(values, "BF16")).stored["weight"].view(np.int8).reshape(4, 64)
        assert np.array_equal(codes, np.clip(np.rint(bf16(values / scales)), -128, 127))


def test_the_first_code_is_the_lowest() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :4] = 7.5, 1, -2, 3
    assert encode(PackedInt(4, 32), weights(values, "BF16")).stored["weight_packed"].view(np.uint32)[0] == 0x8888B69F
    assert encode(CompressedMxfp4(), weights(values, "BF16")).stored["weight_packed"][:2].tolist() == [0x16, 0x3A]
    assert encode(CompressedMxfp4(), weights(values, "BF16")).stored["weight_scale"].tolist() == [128]
    values[0, 4:16] = -6
    fours = encode(CompressedNvfp4(), weights(np.clip(values, -6, 6), "BF16"))
    assert fours.stored["weight_global_scale"].tolist() == [448]
    assert fours.stored["weight_scale"].tolist() == [0x7E, 0x20]  # 448; of a group of zeros the least, 0.125
    assert fours.stored["weight_packed"][:3].tolist() == [0x27, 0x5C, 0xFF]


# --- targets


def members(names: list[str], role: str) -> list[Decision]:
    def tensor(name: str) -> LogicalTensor:
        return LogicalTensor(f"{name}.weight", DTYPES["BF16"], (64, 64), (), None, None, role, "", None)

    return [
        Decision(each, Rule("quantize", ""), Encoding(tensor=each, action="quantize", scheme=PackedInt(4)))
        for each in map(tensor, names)
    ]


EXPERTS = [f"model.layers.{n}.mlp.experts.{e}.{p}_proj" for n in range(3) for e in (0, 1, 10) for p in ("up", "down")]


@pytest.mark.parametrize(
    ("taken", "patterns"),
    [
        (lambda name: True, 1),
        (lambda name: ".layers.1." in name, 1),
        (lambda name: "up_proj" in name, 1),
        (lambda name: name.endswith("experts.1.up_proj"), 3),
        (lambda name: name == EXPERTS[0], 1),
    ],
)
def test_targets_match_their_experts_and_no_others(taken: Callable[[str], bool], patterns: int) -> None:
    wanted = [name for name in EXPERTS if taken(name)]
    everything = [*EXPERTS, "model.layers.0.mlp.gate", "model.layers.0.self_attn.q_proj"]
    targets = targets_of(members(wanted, "expert"), everything)
    assert len(targets) == patterns
    assert all(target.startswith("re:") and "experts" in target for target in targets)
    found = [n for n in everything if any(re.match(target.removeprefix("re:"), n) for target in targets)]
    assert sorted(found) == sorted(wanted)


def test_targets_of_layers_are_their_names() -> None:
    names = ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"]
    assert targets_of(members(names, "mlp"), names) == sorted(names)


# --- config.json and the plan


def test_everything_that_stays_is_ignored_by_name(tmp_path: Path, weightmill: Any) -> None:
    folder = write_moe(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = read_safetensors(folder)
    write_safetensors(folder / "model.safetensors", {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    ran = weightmill(
        "run", f"model.path={folder}", f"output.path={tmp_path / 'out'}", "quant=fp8_dynamic", "format=json",
        "rules=[{name: layers.1.*down_proj, action: keep}]",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    block = read_config(tmp_path / "out")["quantization_config"]
    assert block["ignore"] == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.down_proj"]
    assert block["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert [found for found in ran.document["lint"] if found["level"] == "fault"] == []


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ("w8a8", "experts in W8A8: transformers 5.23 fails to load them"),
        ("nvfp4a16", "experts in NVFP4: transformers 5.23 loads them without a word and computes wrong numbers"),
    ],
)
def test_what_transformers_makes_of_experts_is_said(quant: str, said: str, tmp_path: Path, weightmill: Any) -> None:
    folder = write_moe(tmp_path / "m")
    ran = weightmill("plan", f"model.path={folder}", f"quant={quant}", "format=json")
    assert any(said in warning for warning in ran.document["warnings"])


def test_a_fused_group_of_two_schemes_is_said(source: Path, tmp_path: Path, weightmill: Any) -> None:
    rules = "rules=[{name: q_proj, action: quantize, quant: {preset: w8a8}}]"
    ran = weightmill(
        "run", f"model.path={source}", f"output.path={tmp_path / 'o'}", "quant=fp8_dynamic", rules, "format=json"
    )
    assert any("2 fused groups have several schemes" in warning for warning in ran.document["warnings"])
    assert any("2 fused groups have parts of different schemes" in found["what"] for found in ran.document["lint"])
    groups = read_config(tmp_path / "o")["quantization_config"]["config_groups"]
    assert sorted(len(group["targets"]) for group in groups.values()) == [2, 12]
    assert not any("Linear" in group["targets"] for group in groups.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quant=w4a16", "quant.group_size=48"), "quant.group_size: expected one of 32, 64, 128, or null"),
        (("quant=fp8_block", "quant.group_size=64"), "quant.group_size: fp8_block has groups of its own"),
        (("quant=w4a16",), "its 64 columns are no multiple of quant.group_size=128; keep it by a rule, or choose"),
        (("quant=fp8_block",), "its 64 columns are no multiple of 128, and FP8_BLOCK's engines quantize activations"),
        (
            ("quant=w4a16", "quant.group_size=64", "rules=[{name: up, action: quantize, quant: {preset: w8a8}}]"),
            "rules[0].quant: group_size: Value error, w8a8 has groups of its own",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], said: str, source: Path, weightmill: Any) -> None:
    ran = weightmill("plan", f"model.path={source}", *arguments)
    assert ran.status == 2
    assert said in ran.err


# --- reading what others wrote


@pytest.fixture
def quantized(source: Path, tmp_path: Path, weightmill: Any) -> Callable[[str], Path]:
    def make(quant: str, *more: str) -> Path:
        folder = tmp_path / quant
        ran = weightmill("run", f"model.path={source}", f"output.path={folder}", f"quant={quant}", *more)
        assert ran.status == 0, ran.err
        return folder

    return make


def rewrite(folder: Path, change: Callable[[dict[str, Raw]], None], **weight_arguments: Any) -> None:
    tensors = read_safetensors(folder)
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(weight_arguments)
    (folder / "config.json").write_text(json.dumps(config))


def plain(folder: Path, weightmill: Any) -> Any:
    return weightmill("run", f"model.path={folder}", f"output.path={folder}-plain", "quant=none",
                      "quant.dtype=bfloat16")  # fmt: skip


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("quant", "change", "arguments", "said"),
    [
        ("fp8_dynamic", lambda t: t.pop(f"{Q}.weight_scale"), {}, f"{Q}.weight_scale is missing"),
        ("fp8_dynamic", lambda t: t.pop(f"{Q}.weight"), {}, f"{Q}.weight is missing"),
        ("nvfp4a16", lambda t: t.pop(f"{Q}.weight_global_scale"), {}, f"{Q}.weight_global_scale is missing"),
        ("nvfp4a16", lambda t: t.pop(f"{Q}.weight_scale"), {}, f"{Q}.weight_scale is missing"),
        ("mxfp4a16", lambda t: t.pop(f"{Q}.weight_packed"), {}, f"{Q}.weight is missing"),
        ("w4a16_asym", lambda t: t.pop(f"{Q}.weight_zero_point"), {}, f"{Q}.weight_zero_point is missing"),
        ("w4a16", lambda t: t.pop(f"{Q}.weight_shape"), {}, f"{Q}.weight_shape is missing"),
        ("w4a16", lambda t: None, {"num_bits": 3}, "its scheme is not decoded here: {'num_bits': 3"),
        ("w4a16", lambda t: None, {"group_size": 16}, "weight_packed: expected I32 [64, 8] for BF16 [64, 64]"),
        ("fp8_dynamic", lambda t: None, {"strategy": "block", "block_structure": [64, 64]}, "not decoded here"),
        (
            "w4a16", lambda t: t.update({f"{Q}.weight_g_idx": Raw("I32", np.zeros(64, np.int32))}), {},
            "weight_g_idx",
        ),
    ],
)  # fmt: skip
def test_a_weight_that_is_not_whole_is_an_error(
    quant: str, change: Any, arguments: dict[str, Any], said: str, quantized: Any, weightmill: Any
) -> None:
    folder = quantized(quant, *(("quant.group_size=32",) if quant.startswith("w4") else ()), "source.unit_mb=100")
    rewrite(folder, change, **arguments)
    ran = plain(folder, weightmill)
    assert ran.status == 1 or ran.status == 2
    assert said in ran.err


def test_one_scale_for_a_tensor_is_read_and_what_belongs_to_it_goes(quantized: Any, weightmill: Any) -> None:
    folder = quantized("fp8_dynamic", "source.unit_mb=100")

    def change(tensors: dict[str, Raw]) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = weights(np.array([0.5], np.float32), "BF16")
            tensors[name.replace("weight_scale", "input_scale")] = weights(np.array([2.0], np.float32), "BF16")

    rewrite(folder, change, strategy="tensor")
    ran = plain(folder, weightmill)
    assert ran.status == 0, ran.err
    before, after = read_safetensors(folder), read_safetensors(Path(f"{folder}-plain"))
    assert not [name for name in after if "scale" in name]
    expected = reference.e4m3(before[f"{Q}.weight"].data) * np.float32(0.5)
    assert np.array_equal(values_of(after[f"{Q}.weight"]), bf16(expected))


def test_a_scale_a_row_and_rows_that_end_within_a_word_are_read(tmp_path: Path, weightmill: Any) -> None:
    """W4A16 by channel, 61 columns: eight words a row, the last of five codes."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (64, 61)), weights(rng.random((64, 1), np.float32), "BF16")
    padded = np.zeros((64, 64), np.uint32)
    padded[:, :61] = codes
    words = (padded.reshape(64, 8, 8) << np.arange(0, 32, 4, dtype=np.uint32)).sum(2).astype(np.uint32)
    tensors = llama_tensors()
    del tensors[f"{Q}.weight"]
    tensors |= {f"{Q}.weight_packed": Raw("I32", words.view(np.int32)), f"{Q}.weight_scale": scales,
                f"{Q}.weight_shape": Raw("I64", np.array([64, 61]))}  # fmt: skip
    arguments = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True, "group_size": None}
    block = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": [Q], "weights": arguments}}}
    folder = write_checkpoint(
        tmp_path / "m", tensors, config={**LLAMA, "dtype": "bfloat16", "quantization_config": block}
    )
    assert plain(folder, weightmill).status == 0
    found = values_of(read_safetensors(Path(f"{folder}-plain"))[f"{Q}.weight"])
    assert np.array_equal(found, bf16((codes - 8).astype(np.float32) * values_of(scales)))


# --- lint


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda block: block.update(ignore=[]), "1 linear layers are stored plain and are not in ignore: lm_head"),
        (lambda block: block.update(ignore=["lm_head", "re:.*up_proj"]), "2 quantized layers are in ignore"),
        (lambda block: block["config_groups"]["group_0"].update(targets=["re:.*layers.0"]), "no group of config.json"),
        (
            lambda block: block["config_groups"].update(
                x={**block["config_groups"]["group_0"], "targets": ["re:.*o_proj"]}
            ),
            'a group has the target "Linear", beside others',
        ),
        (lambda block: block.update(ignore=["lm_head", "re:("]), "ignore has what is no regular expression: re:("),
        (lambda block: block.update(ignore=[3]), "quantization_config.ignore is no list of names"),
    ],
)
def test_lint_finds_a_config_that_misleads_the_engine(change: Any, what: str, quantized: Any, weightmill: Any) -> None:
    folder = quantized("fp8_dynamic")
    assert weightmill("lint", f"output.path={folder}", "format=json").document["faults"] == 0
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    found = weightmill("lint", f"output.path={folder}", "format=json").document["findings"]
    assert any(what in finding["what"] for finding in found), found
