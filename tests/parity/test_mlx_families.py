"""Every model type with a section for mlx-lm, on a tiny checkpoint: bytes, config.json and logits of mlx_lm itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.architectures.family_files import known_types, section
from loaders.errors import BadSpec
from tests import mlx_reference, passes
from tests.engines import mlx_lm_or_skip
from tests.making import Raw, read_safetensors, values_of
from tests.quick import some_quick
from tests.tiny_configs import TINY

mx = pytest.importorskip("mlx.core")
mlx_utils = mlx_lm_or_skip()
pytest.importorskip("transformers")
pytestmark = pytest.mark.engine

ALL = {**TINY, **mlx_reference.MORE}
TYPES = {kind: kind if kind in mlx_reference.OWN_TYPES else tiny.model_type for kind, tiny in ALL.items()}
# Types without a tiny checkpoint, which a relative with the same section stands for.
RELATIVES = {"mimo": "qwen2"}
KINDS = [kind for kind, of in TYPES.items() if section(of, "mlx") is not None and kind not in mlx_reference.APART]
GROUPS = (f"quant.group_size={mlx_reference.GROUP}",)
# Keys of config.json that may differ, and why.
DIFFERENT = {
    "eos_token_id": "mlx-lm writes that of generation_config.json, which it reads again when it loads",
    "rope_type": "mlx-lm's class of settings renames this key of the dictionary that is then saved",
    "type": "see rope_type",
    "rope_scaling": "an absent one is null",
    "partial_rotary_factor": "given to the reference, and not read",
    "intermediate_size": "mamba2 needs the key and does not use it",
    "sliding_window_pattern": "null where no layer has a window",
    "time_step_limit": "transformers writes infinity as an object, which Python's own JSON does not need",
    "head_dim": "ours says it, where mlx-lm works it out",
    "num_global_key_value_heads": "an absent one is null",
}


@pytest.fixture(autouse=True)
def _on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


def flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in ("quantization", "quantization_config"):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def settings(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a quantization block with what its modules leave unsaid."""
    return {key: {"mode": "affine", **value} if isinstance(value, dict) else value for key, value in block.items()}


def check_config(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    mine, wanted = dict(flat(ours)), dict(flat(theirs))
    other = [key for key in wanted if mine.get(key) != wanted[key] and key.rsplit(".", 1)[-1] not in DIFFERENT]
    assert other == ["quantization", "quantization_config"] or not other, {k: (mine.get(k), wanted[k]) for k in other}
    for key in ("quantization", "quantization_config"):
        assert settings(ours[key]) == settings(theirs[key])


def check_tensors(mine: Mapping[str, Raw], wanted: Mapping[str, Raw]) -> None:
    assert set(mine) == set(wanted)
    for name, raw in wanted.items():
        assert (mine[name].dtype, mine[name].data.shape) == (raw.dtype, raw.data.shape), name
        assert mine[name].data.tobytes() == raw.data.tobytes(), name


@pytest.mark.parametrize("kind", some_quick(KINDS, "deepseek_v32"))
def test_bytes_config_and_logits_are_those_of_mlx_lm(kind: str, tmp_path: Path) -> None:
    source = mlx_reference.make(kind, tmp_path / "source")
    given = mlx_reference.GIVEN.get(kind, {})
    model = mlx_reference.theirs(source, tmp_path / "peer", given, strict=kind not in mlx_reference.LOOSE)
    ours = passes.run(source, tmp_path, "mlx_int4", settings=GROUPS)["mlx_int4"]
    mine, wanted = read_safetensors(ours.folder), read_safetensors(tmp_path / "peer")
    check_tensors(mine, wanted)
    check_config(*(json.loads((f / "config.json").read_text()) for f in (ours.folder, tmp_path / "peer")))
    loaded, _ = mlx_utils.load_model(ours.folder)
    found, expected = mlx_reference.logits(loaded), mlx_reference.logits(model)
    assert np.isfinite(found).all()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["deepseek_v2", "nemotron_h", "lfm2_moe", "qwen3_5"])
def test_a_mixed_recipe_goes_by_mlx_lms_names(kind: str, tmp_path: Path) -> None:
    source = mlx_reference.make(kind, tmp_path / "source")
    mlx_reference.theirs(source, tmp_path / "peer", mlx_reference.GIVEN.get(kind, {}), recipe="mixed_4_6")
    ours = passes.run(source, tmp_path, "mlx_mixed_4_6", settings=GROUPS)["mlx_mixed_4_6"]
    check_tensors(*(read_safetensors(folder) for folder in (ours.folder, tmp_path / "peer")))


@pytest.mark.parametrize("kind", some_quick(KINDS, "qwen3_5"))
def test_mlx_checkpoints_are_read_back(kind: str, tmp_path: Path) -> None:
    """Written again they are the same, to the bit: names, norms and axes are undone, and done again."""
    source = mlx_reference.make(kind, tmp_path / "source")
    plain = passes.run(source, tmp_path / "a", "none", settings=("output=mlx",))["none"]
    again = passes.run(plain.folder, tmp_path / "b", "none", settings=("output=mlx",))["none"]
    assert again.tensors == plain.tensors


@pytest.mark.parametrize("kind", ["kimi_k2", "granitemoe", "gpt2", "gemma4_moe"])
def test_quantized_mlx_checkpoints_are_read_back(kind: str, tmp_path: Path) -> None:
    plain = mlx_reference.make(kind, tmp_path / "source")
    coarse = passes.run(plain, tmp_path / "c", "mlx_int8", settings=GROUPS)["mlx_int8"]
    fine = passes.run(coarse.folder, tmp_path / "d", "mlx_int4", settings=GROUPS)["mlx_int4"]
    assert fine.tensors.keys() == coarse.tensors.keys()


@pytest.mark.parametrize("kind", ["qwen3_5", "gpt2", "mamba2", "step3p5"])
def test_published_tensors_come_back(kind: str, tmp_path: Path) -> None:
    source = mlx_reference.make(kind, tmp_path / "source")
    plain = passes.run(source, tmp_path / "a", "none", settings=("output=mlx",))["none"]
    back = passes.run(plain.folder, tmp_path / "b", "none", settings=("quant.dtype=bfloat16",))["none"]
    published, found = (read_safetensors(folder) for folder in (source, back.folder))
    shared = found.keys() & published.keys()
    assert len(shared) > 20
    for name in shared:
        if "norm" in name:  # one was added to some, and rounded
            assert np.allclose(values_of(found[name]), values_of(published[name]), atol=2**-8), name
        elif found[name].dtype == published[name].dtype:
            assert found[name].data.tobytes() == published[name].data.tobytes(), name


def test_pieces_of_a_published_tensor_go_to_mlx_only(tmp_path: Path) -> None:
    source = mlx_reference.make("kimi_k2", tmp_path / "source")
    plain = passes.run(source, tmp_path / "a", "none", settings=("output=mlx",))["none"]
    with pytest.raises(
        BadSpec, match="mlx-lm has cut tensors of this kimi_k2 into pieces .6, model.layers.0.self_attn"
    ):
        passes.plan(plain.folder, "nf4")


def test_a_model_without_the_tower_that_it_describes_does_not_go_to_transformers(tmp_path: Path) -> None:
    source = mlx_reference.make("qwen3_5", tmp_path / "source")
    coarse = passes.run(source, tmp_path / "a", "mlx_int8", settings=GROUPS)["mlx_int8"].folder
    passes.plan(coarse, "nf4")
    config = json.loads((coarse / "config.json").read_text())
    (coarse / "config.json").write_text(json.dumps({**config, "vision_config": {"depth": 1}}))
    with pytest.raises(BadSpec, match="this MLX checkpoint of a qwen3_5 has no tower for images"):
        passes.plan(coarse, "nf4")
    passes.plan(coarse, "gguf_q8_0")
    passes.plan(coarse, "mlx_int4", settings=GROUPS)


def test_experts_of_stacks_do_not_go_back_to_transformers(tmp_path: Path) -> None:
    source = mlx_reference.make("granitemoe", tmp_path / "source")
    plain = passes.run(source, tmp_path / "a", "none", settings=("output=mlx",))["none"]
    with pytest.raises(BadSpec, match="transformers' granitemoe holds experts in stacks"):
        passes.plan(plain.folder, "none", settings=("quant.dtype=float16",))


def test_every_type_with_a_section_has_a_tiny_checkpoint() -> None:
    assert set(known_types("mlx")) <= {*TYPES.values(), *RELATIVES}


@pytest.mark.parametrize("model_type", mlx_reference.LACKS)
def test_mlx_lm_still_lacks_the_types_that_have_no_section(model_type: str) -> None:
    assert section(model_type, "mlx") is None
    with pytest.raises(ValueError, match="not supported"):
        mlx_utils._get_classes({"model_type": model_type})


def test_every_tiny_type_has_a_section_or_a_reason() -> None:
    assert {tiny.model_type for tiny in TINY.values()} <= {*known_types("mlx"), *mlx_reference.LACKS}
