"""What a checkpoint says of its quantization is believed or refused by name, and never passed over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import ThreadedWork
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec
from loaders.tensors.quantized_sources import check_decodable
from loaders.tensors.sources import tensors_of
from tests.loaders.tensors.quantized import Q_PROJ, write
from tests.making import IN_ORDER, LLAMA, Raw, llama_tensors, packed_words, weights, write_checkpoint
from tests.reading import tensors_in, values

pytestmark = pytest.mark.quick

MODULE = Q_PROJ.removesuffix(".weight")
SECOND = MODULE.replace("layers.0", "layers.1")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    },
}


def gptq(module: str = MODULE) -> dict[str, Raw]:
    """Random codes of four bits for a matrix of 64 x 64, in groups of 32."""
    rng = np.random.default_rng(0)
    return {
        f"{module}.qweight": Raw("I32", packed_words(rng.integers(0, 16, (64, 64)).T, IN_ORDER).T),
        f"{module}.qzeros": Raw("I32", packed_words(rng.integers(0, 16, (2, 64)), IN_ORDER)),
        f"{module}.scales": Raw("F16", rng.random((2, 64)).astype(np.float16)),
    }


def fp8(module: str = MODULE) -> dict[str, Raw]:
    scale = weights(np.full((64, 1), 0.01, np.float32), "BF16")
    return {
        f"{module}.weight": Raw("F8_E4M3", np.full((64, 64), 0x38, np.uint8)),
        f"{module}.weight_scale": scale,
    }


def model(*parts: Mapping[str, Raw], without: tuple[str, ...] = (Q_PROJ,)) -> dict[str, Raw]:
    made = {name: raw for name, raw in llama_tensors().items() if name not in without}
    for each in parts:
        made |= each
    return made


def folder(root: Path, tensors: Mapping[str, Raw], **config: Any) -> Path:
    return write_checkpoint(root, tensors, config={**LLAMA, "dtype": "bfloat16", **config})


def notes_of(root: Path) -> str:
    checkpoint = open_checkpoint(root)
    check_decodable(checkpoint)
    return "\n".join(tensors_of(checkpoint, decode=True).notes)


# --- where it may be said


@pytest.mark.parametrize("decode", [True, False])
def test_a_block_over_plain_weights_is_an_error(tmp_path: Path, decode: bool) -> None:
    root = write(tmp_path, llama_tensors(), GPTQ)
    with pytest.raises(BadCheckpoint, match=r"config.json's quantization_config says .* \(gptq\), but all are stored"):
        tensors_of(open_checkpoint(root), decode=decode)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_settings_in_a_file_beside_config_json_are_read(tmp_path: Path, file: str, work: ThreadedWork) -> None:
    told = write(tmp_path / "told", model(gptq()), GPTQ, dtype="BF16")
    root = folder(tmp_path / "file", model(gptq()))
    (root / file).write_text(json.dumps(GPTQ))
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), values(told, tensors_in(told)[Q_PROJ], work))


def test_two_descriptions_that_differ_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path, model(gptq()), GPTQ)
    (root / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 32}))
    with pytest.raises(BadCheckpoint, match=r"quantization_config says bits 4, and quantize_config.json says 8"):
        check_decodable(open_checkpoint(root))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (gptq(), "GPTQ or AWQ"),
        (fp8(), "F8_E4M3"),
        ({Q_PROJ: Raw("F8_E5M2", np.ones((64, 64), np.uint8))}, "F8_E5M2"),
        ({Q_PROJ: Raw("I8", np.ones((64, 64), np.int8))}, "I8"),
        ({f"{MODULE}.weight_packed": Raw("I32", np.ones((64, 8), np.int32))}, "compressed-tensors"),
        (
            {"a.down_proj_blocks": Raw("U8", np.ones((2, 4, 1, 16), np.uint8)), "a.down_proj_scales":
             Raw("U8", np.ones((2, 4, 1), np.uint8))},
            "MXFP4",
        ),
    ],
)  # fmt: skip
def test_packed_tensors_that_nothing_describes_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, Raw], said: str
) -> None:
    checkpoint = open_checkpoint(folder(tmp_path, model(tensors)))
    with pytest.raises(BadSpec, match=f"by its tensors, .*{said}.*, but no file says how"):
        check_decodable(checkpoint)
    assert "as they are stored" in "".join(tensors_of(checkpoint, decode=False).notes)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"llm_config": {"quantization_config": GPTQ}}, "config.json's llm_config.quantization_config says"),
        ({"compression_config": COMPRESSED}, "config.json's compression_config says"),
        (
            {"quantization_config": ["gptq"]},
            "config.json: expected an object as quantization_config, found a list of 1",
        ),
    ],
)
def test_a_description_where_none_is_read_is_refused_by_name(tmp_path: Path, config: Any, said: str) -> None:
    with pytest.raises((BadSpec, BadCheckpoint), match=said):
        check_decodable(open_checkpoint(folder(tmp_path, model(gptq()), **config)))


def test_a_block_that_quantizes_a_cache_alone_leaves_weights_plain(tmp_path: Path) -> None:
    block = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}
    assert open_checkpoint(folder(tmp_path, model(without=()), quantization_config=block)).quantized_by is None


# --- whether it fits


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 8}, r"q_proj.weight: the settings say 8 bits, but its shapes are those of 4"),
        ({"group_size": 16}, r"expected I32 \[4, 8\] for 64 outputs and 64 inputs of 4 bits in groups of 16"),
        ({"dynamic": {"+:.*no_such": {"bits": 8}}}, r"'\+:\.\*no_such' names no module of this checkpoint"),
        ({"dynamic": {"-:.*no_such": {}}}, r"names no module"),
        ({"dynamic": {"-:.*q_proj": {}}}, r"say that it is plain, but it is stored quantized"),
        ({"dynamic": {"+:.*o_proj": {"bits": 8}}}, r"says how modules are quantized that are all stored"),
        ({"dynamic": {"(": {}}}, r"is no regular expression"),
    ],
)
def test_gptqs_settings_must_fit_its_tensors(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    root = write(tmp_path, model(gptq()), {**GPTQ, **settings})
    with pytest.raises(BadCheckpoint, match=said):
        tensors_in(root)


def test_a_list_of_modules_that_are_not_there_is_an_error(tmp_path: Path) -> None:
    root = write(tmp_path, model(fp8()), {**COMPRESSED, "ignore": ["lm_head", "re:.*visual.*", "tower.fc1"]})
    with pytest.raises(BadCheckpoint, match=r"names none of this checkpoint, 're:\.\*visual\.\*' first"):
        tensors_in(root)


def test_heads_may_be_listed_without_being_stored(tmp_path: Path) -> None:
    root = write(tmp_path, model(fp8(), without=(Q_PROJ, "lm_head.weight")), {**COMPRESSED, "ignore": ["lm_head"]})
    assert "lm_head" not in notes_of(root)


def test_single_entries_that_name_nothing_are_told(tmp_path: Path) -> None:
    root = write(tmp_path, model(fp8()), {**COMPRESSED, "ignore": [SECOND, "tower.fc1"]})
    assert notes_of(root) == "config.json's quantization_config excludes 1 module that is not there, 'tower.fc1' first"


def test_an_excluded_module_that_is_quantized_is_an_error_but_for_a_head(tmp_path: Path) -> None:
    root = write(tmp_path / "a", model(fp8()), {**COMPRESSED, "ignore": ["model.layers.0"]})
    with pytest.raises(BadCheckpoint, match="q_proj: .* says that it is not quantized, but it is stored quantized"):
        tensors_in(root)
    head = fp8("lm_head")
    root = write(tmp_path / "b", model(head, without=()), {**COMPRESSED, "ignore": ["lm_head"]})
    assert "lm_head is stored quantized, though" in notes_of(root)


def test_plain_matrices_among_quantized_ones_are_told(tmp_path: Path) -> None:
    root = write(tmp_path, model(fp8()), COMPRESSED)
    assert f"1 matrix is stored plain, {SECOND}.weight first, though" in notes_of(root)


@pytest.mark.parametrize("name", [f"{SECOND}.weight_zero_point", f"{SECOND}.qweight", f"{SECOND}.g_idx"])
def test_a_part_that_belongs_to_nothing_is_an_error(tmp_path: Path, name: str) -> None:
    extra = {name: Raw("I32", np.ones((8, 64), np.int32))}
    block = {"quant_method": "fp8", "weight_block_size": None}
    parts = {Q_PROJ: fp8()[Q_PROJ], f"{Q_PROJ}_scale_inv": weights(np.ones((1, 1), np.float32), "F32")}
    with pytest.raises(BadCheckpoint, match="looks like a packed weight or its scale"):
        tensors_in(write(tmp_path, model(parts, extra), block))


def test_a_group_for_modules_that_are_not_there_is_an_error(tmp_path: Path) -> None:
    groups = {"group_0": {**COMPRESSED["config_groups"]["group_0"], "targets": ["re:.*experts.*"]}}
    groups |= {"group_1": COMPRESSED["config_groups"]["group_0"]}
    with pytest.raises(BadCheckpoint, match=r"a group for '\.\*experts\.\*', but no module of that name"):
        tensors_in(write(tmp_path, model(fp8()), {**COMPRESSED, "config_groups": groups}))


# --- zero biases


@pytest.mark.parametrize(
    ("config", "bias", "kept"),
    [
        ({}, 0.0, False),
        ({"attention_bias": True}, 0.0, True),
        ({}, 0.5, True),
        ({"model_type": "no_such"}, 0.0, True),
    ],
)
def test_biases_of_zeros_that_the_model_has_not_are_dropped(
    tmp_path: Path, config: dict[str, Any], bias: float, kept: bool
) -> None:
    parts = gptq() | {f"{MODULE}.bias": weights(np.full(64, bias, np.float32), "F16")}
    root = write(tmp_path, model(parts), GPTQ, **config)
    assert (f"{MODULE}.bias" in tensors_in(root)) == kept
    said = notes_of(root)
    assert ("1 bias of zeros" in said) == (not kept)
    assert ("is not known for model_type 'no_such'" in said) == ("model_type" in config)


# --- MLX


def mlx(module: str = MODULE) -> dict[str, Raw]:
    return {
        f"{module}.weight": Raw("U32", np.ones((64, 8), np.uint32)),
        f"{module}.scales": weights(np.ones((64, 1), np.float32), "BF16"),
        f"{module}.biases": weights(np.ones((64, 1), np.float32), "BF16"),
    }


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"no.such": {"bits": 8, "group_size": 64}}, "no.such is quantized by settings of its own, but there is none"),
        ({SECOND: {"bits": 8, "group_size": 64}}, "but it is stored plain"),
        ({MODULE: False}, "is not quantized, but it is stored quantized"),
    ],
)
def test_mlxs_settings_of_a_module_must_fit_it(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    root = folder(tmp_path, model(mlx()), quantization={"bits": 4, "group_size": 64, **entry})
    with pytest.raises(BadCheckpoint, match=said):
        tensors_in(root)


def test_mlx_checkpoints_of_unknown_models_are_copied_only(tmp_path: Path) -> None:
    root = folder(tmp_path, model(mlx()), quantization={"bits": 4, "group_size": 64}, model_type="no_such")
    checkpoint = open_checkpoint(root)
    with pytest.raises(BadSpec, match="mlx-lm's checkpoint of model_type 'no_such'"):
        check_decodable(checkpoint)
    assert len(tensors_of(checkpoint, decode=False).tensors) == len(checkpoint.weights)


@pytest.mark.parametrize(("model_type", "refused"), [("no_such", True), ("llama", False)])
def test_plain_weights_that_mlx_lm_saved_count_as_mlx_if_the_model_is_unknown(
    tmp_path: Path, model_type: str, refused: bool
) -> None:
    root = folder(tmp_path, model(without=()), model_type=model_type)
    file = root / "model.safetensors"
    raw = file.read_bytes().replace(b'"format": "pt"', b'"format":"mlx"')
    file.write_bytes(raw)
    assert (open_checkpoint(root).quantized_by == "mlx") == refused


# --- float4 experts


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("step", [None, 7, 500])
def test_float4_experts_are_decoded_low_code_first(tmp_path: Path, work: ThreadedWork, step: int | None) -> None:
    rng = np.random.default_rng(0)
    packed, scales = rng.integers(0, 256, (48, 32), np.uint8), rng.integers(120, 130, (48, 2), np.uint8)
    name = "layers.0.ffn.experts.0.w1"
    tensors = {f"{name}.weight": Raw("I8", packed.view(np.int8)), f"{name}.scale": Raw("F8_E8M0", scales)}
    root = write(tmp_path, model(tensors, without=()), {"quant_method": "fp8"}, model_type="deepseek_v4")
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(48, 64)
    signs = np.where(codes & 8, -1, 1).astype(np.float32)
    wanted = signs * magnitude[codes & 7] * np.repeat(np.exp2(scales.astype(np.float32) - 127), 32, axis=1)
    assert np.array_equal(values(root, tensors_in(root)[f"{name}.weight"], work, step), wanted)


def test_float4_without_its_scale_is_refused(tmp_path: Path) -> None:
    tensors = {"layers.0.ffn.experts.0.w1.weight": Raw("I8", np.ones((48, 32), np.int8))}
    with pytest.raises(BadCheckpoint, match=r"experts.0.w1.scale is missing"):
        tensors_in(write(tmp_path, model(tensors, without=()), {"quant_method": "fp8"}))
