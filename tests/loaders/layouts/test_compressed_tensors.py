"""compressed-tensors' layout without the library: targets, what is ignored, damage, what is refused and warned of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.derived_config import read_config
from loaders.dtypes import DTYPES
from loaders.layouts.compressed_tensors import targets_of
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.rules.rule import Decision, Rule
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor
from tests import reference
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
from tests.reading import files_of


def bf16(values: np.ndarray) -> np.ndarray:
    return values_of(weights(values, "BF16"))


# --- targets


def members(names: list[str], role: str) -> list[Decision]:
    def tensor(name: str) -> LogicalTensor:
        return LogicalTensor(
            name=f"{name}.weight",
            dtype=DTYPES["BF16"],
            shape=(64, 64),
            stored=(),
            window=None,
            decode=None,
            role=role,
            block="",
            group=None,
        )

    return [
        Decision(each, Rule(action="quantize", why=""), Encoding(tensor=each, action="quantize", scheme=PackedInt(4)))
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


@pytest.mark.quick
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
    block = read_config(files_of(tmp_path / "out"))["quantization_config"]
    assert block["ignore"] == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.down_proj"]
    assert block["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert [found for found in ran.document["lint"] if found["level"] == "fault"] == []


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ("w8a8", "experts are in W8A8: transformers 5 fails (CONVERSION)"),
        (
            "nvfp4a16",
            "experts are in NVFP4: transformers 5 forgets their global scale and silently",
        ),
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
    groups = read_config(files_of(tmp_path / "o"))["quantization_config"]["config_groups"]
    assert sorted(len(group["targets"]) for group in groups.values()) == [2, 12]
    assert not any("Linear" in group["targets"] for group in groups.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quant=w4a16", "quant.group_size=48"), "quant.group_size: expected one of 32, 64, 128, or null"),
        (("quant=fp8_block", "quant.group_size=64"), "quant.group_size: fp8_block has groups of its own"),
        (
            ("quant=w4a16",),
            "64 columns do not divide into groups of 128; quant.group_size=64 fits all; to keep them",
        ),
        (
            ("quant=fp8_block",),
            "their 64 columns do not divide into groups of 128, and FP8_BLOCK's engines quantize activations",
        ),
        (
            ("quant=w4a16", "quant.group_size=64", "rules=[{name: up, action: quantize, quant: {preset: w8a8}}]"),
            "rules[0].quant.group_size: w8a8 has groups of its own",
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


def plain(folder: Path, weightmill: Any, *settings: str) -> Any:
    return weightmill("run", f"model.path={folder}", f"output.path={folder}-plain", "quant=none",
                      "quant.dtype=bfloat16", *settings)  # fmt: skip


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
    folder = quantized(quant, *(("quant.group_size=32",) if quant.startswith("w4") else ()), "unit_mb=100")
    rewrite(folder, change, **arguments)
    ran = plain(folder, weightmill)
    assert ran.status == 1 or ran.status == 2
    assert said in ran.err


def test_one_scale_for_a_tensor_is_read_and_what_belongs_to_it_goes(quantized: Any, weightmill: Any) -> None:
    folder = quantized("fp8_dynamic", "unit_mb=100")

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
    assert plain(folder, weightmill, "lint=warn").status == 0  # its 61 columns are not config.json's hidden_size
    found = values_of(read_safetensors(Path(f"{folder}-plain"))[f"{Q}.weight"])
    assert np.array_equal(found, bf16((codes - 8).astype(np.float32) * values_of(scales)))


# --- lint


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda block: block.update(ignore=[]), "1 linear layer is stored plain and not in ignore: lm_head"),
        (lambda block: block.update(ignore=["lm_head", "re:.*up_proj"]), "2 quantized layers are in ignore"),
        (lambda block: block["config_groups"]["group_0"].update(targets=["re:.*layers.0"]), "no group of config.json"),
        (
            lambda block: block["config_groups"].update(
                x={**block["config_groups"]["group_0"], "targets": ["re:.*o_proj"]}
            ),
            'a group has the target "Linear", beside others',
        ),
        (
            lambda block: block.update(ignore=["lm_head", "re:("]),
            "quantization_config.ignore: '(' is no regular expression",
        ),
        (lambda block: block.update(ignore=[3]), "expected a list of texts as quantization_config.ignore"),
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
