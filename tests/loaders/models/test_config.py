"""The settings of loading a model by their two names, by position, and what contradicts what."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from loaders.errors import BadSpec
from loaders.models import Backend, LoadingStrategy, ModelLoadingConfig, QuantizationConfig, QuantizationMethod
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.quantization.schemes.hqq import Hqq
from loaders.quantization.schemes.mlx_affine import MlxAffine

pytestmark = pytest.mark.quick
POSITIONS = [
    "model_name", "backend", "loading_strategy", "quantization_config", "dtype", "device", "low_memory",
    "offload_to_cpu", "max_memory", "loading_workers", "use_safetensors", "use_cache", "attn_implementation", "rank",
    "world_size", "verbose", "llama_pro_path",
]  # fmt: skip


def test_positions_are_those_of_trainers() -> None:
    parameters = [*inspect.signature(ModelLoadingConfig.__init__).parameters.values()][1:]
    assert [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD] == POSITIONS
    quantization = QuantizationConfig(QuantizationMethod.BNB_NF4, 4, 64, "bfloat16")
    given = (
        "model", Backend.CUDA, LoadingStrategy.LOW_MEMORY, quantization, "float16", "cuda:1", True, True,
        {"cpu": "8GB"}, 4, False, True, "eager", 1, 2, True, "expanded",
    )  # fmt: skip
    config = ModelLoadingConfig(*given)
    assert [getattr(config, name) for name in POSITIONS] == list(given)
    assert config == ModelLoadingConfig(**dict(zip(POSITIONS, given, strict=True)))


@pytest.mark.parametrize(
    ("short", "long", "value"),
    [
        ("strategy", "loading_strategy", LoadingStrategy.STREAMING),
        ("quantize", "quantization_config", "nf4"),
        ("workers", "loading_workers", 3),
        ("attention", "attn_implementation", "eager"),
    ],
)
def test_both_names_are_one_setting(short: str, long: str, value: Any) -> None:
    for config in (ModelLoadingConfig(**{short: value}), ModelLoadingConfig(**{long: value, short: value})):
        assert getattr(config, short) == getattr(config, long) == value
    others = {"strategy": "full", "quantize": "fp4", "workers": 2, "attention": "sdpa"}
    with pytest.raises(BadSpec, match=f"^{short}: .*{long} .*one setting"):
        ModelLoadingConfig(**{short: value, long: others[short]})


def test_defaults_are_those_of_the_backend() -> None:
    for backend, wanted in (("cpu", "full"), ("cuda", "full"), ("mps", "unified_memory"), ("mlx", "unified_memory")):
        assert ModelLoadingConfig("m", backend).loading_strategy is LoadingStrategy(wanted)
        assert ModelLoadingConfig("m", backend, low_memory=True).loading_strategy is LoadingStrategy.LOW_MEMORY
        assert ModelLoadingConfig("m", backend, LoadingStrategy.FULL).loading_strategy is LoadingStrategy.FULL
    assert ModelLoadingConfig(device="cuda:1").backend is Backend.CUDA
    assert ModelLoadingConfig().workers is None
    assert ModelLoadingConfig(workers=None).loading_workers == -1


def test_settings_are_replaced_under_either_name() -> None:
    config = ModelLoadingConfig("m", "cpu", strategy="streaming", workers=2)
    changed = config.with_settings(loading_strategy="full", attention="eager", loading_workers=-1)
    assert (changed.strategy, changed.attention, changed.workers) == (LoadingStrategy.FULL, "eager", None)
    assert changed.model_name == "m"
    assert config.with_settings(backend="mps").strategy is LoadingStrategy.STREAMING
    assert ModelLoadingConfig().with_settings(backend="mps").strategy is LoadingStrategy.UNIFIED_MEMORY
    assert ModelLoadingConfig().with_settings(low_memory=True).strategy is LoadingStrategy.LOW_MEMORY
    low = ModelLoadingConfig(low_memory=True).with_settings(strategy="streaming")
    assert (low.strategy, low.low_memory) == (LoadingStrategy.STREAMING, False)
    assert ModelLoadingConfig(device="cuda:1").with_settings(device="cpu").backend is Backend.CPU


def test_a_method_is_a_scheme() -> None:
    assert QuantizationConfig(QuantizationMethod.BNB_NF4).scheme == Bnb4("nf4")
    assert QuantizationConfig("bnb_fp4", group_size=128).scheme == Bnb4("fp4", 128)
    assert QuantizationConfig(QuantizationMethod.BNB_INT8, bits=8).scheme == LlmInt8()
    assert QuantizationConfig(QuantizationMethod.HQQ).scheme == Hqq(4, 64)
    assert QuantizationConfig(QuantizationMethod.HQQ, 3, 128).scheme == Hqq(3, 128)
    assert QuantizationConfig(QuantizationMethod.MLX_INT4).scheme == MlxAffine(4, 64)
    assert QuantizationConfig(QuantizationMethod.MLX_INT8, group_size=32).scheme == MlxAffine(8, 32)
    assert ModelLoadingConfig(quantize=QuantizationMethod.HQQ).scheme == Hqq(4, 64)
    assert ModelLoadingConfig(quantize="bnb_int8").scheme == LlmInt8()
    # By the names of presets, too.
    assert QuantizationConfig("nf4", double_quant=True).scheme == Bnb4("nf4", double_quant=True)
    assert QuantizationConfig("int8") == QuantizationConfig(QuantizationMethod.BNB_INT8)
    assert QuantizationConfig("hqq3", group_size=128).scheme == Hqq(3, 128)
    assert QuantizationMethod("fp4") is QuantizationMethod.BNB_FP4
    assert ModelLoadingConfig(quantize="none") == ModelLoadingConfig()
    # Of methods that compute in the model's dtype, it is the model's.
    assert ModelLoadingConfig(quantize=QuantizationConfig("hqq", compute_dtype="float16")).dtype == "float16"
    assert ModelLoadingConfig(quantize=QuantizationConfig("bnb_nf4", compute_dtype="float16")).dtype is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "nf5"}, "method: unknown 'nf5'.*known: bnb_nf4, "),
        ({"method": "bnb_nf4", "bits": 8}, "bits: bnb_nf4 has 4, found 8"),
        ({"method": "hqq", "bits": 5}, "bits: hqq has 1 or 2 or 3 or 4 or 8, found 5"),
        ({"method": "bnb_int8", "group_size": 64}, "group_size: bnb_int8 has a scale for each row"),
        ({"method": "mlx_int4", "group_size": 16}, "group_size: mlx_int4 takes 32 or 64 or 128, found 16"),
        ({"method": "hqq4", "bits": 3}, "bits: hqq4 has 4, found 3; give method='hqq'"),
        ({"method": "int8", "double_quant": True}, "double_quant: bnb_int8 has no choice of it"),
        ({"double_quant": 1}, "double_quant: expected True or False, found 1"),
        ({"method": "bnb_nf4", "compute_dtype": "bf16"}, "compute_dtype: unknown 'bf16'; did you mean 'bfloat16'"),
    ],
)
def test_a_method_without_such_sizes_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        QuantizationConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"low_memory": True, "strategy": "streaming"}, "low_memory: it is strategy=low_memory"),
        ({"strategy": "streaming", "offload_to_cpu": True}, "weights lie nowhere between forwards"),
        ({"strategy": "streaming", "max_memory": {"cpu": 1}}, "memory_budget_mb limits"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to 1 of world_size=2, found 2"),
        ({"rank": -1}, "rank: expected 0 to 0"),
        ({"world_size": 1.5}, "world_size: expected a whole number"),
        ({"verbose": "yes"}, "verbose: expected True or False, found 'yes'"),
        ({"device": "cuda:x"}, "device: unknown 'cuda:x'"),
        ({"device": "cpu:0"}, "device: unknown 'cpu:0'"),
        ({"backend": "cpu", "device": "cuda"}, "device: cuda is none of backend=cpu"),
        ({"loading_workers": -2}, "workers: expected at least 1"),
        (
            {"quantize": QuantizationConfig("hqq", compute_dtype="float16"), "dtype": "float32"},
            "compute_dtype: the method computes in the model's dtype",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        ModelLoadingConfig(**settings)
