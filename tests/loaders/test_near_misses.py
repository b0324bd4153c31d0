"""What people give to the library who know transformers, bitsandbytes and others: refused with what to give here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loaders import (
    LoadConfig,
    configure,
    get_recommended_loader_config,
    load_and_quantize,
    load_weights,
    loader,
    preset,
)
from loaders.errors import BadSpec
from loaders.places import DEMO
from tests.jobs.cli.test_meant import INNER

torch = pytest.importorskip("torch", reason="weights are torch's tensors")


def weights(**settings: Any) -> Any:
    return load_weights(DEMO, **settings)


def models(**settings: Any) -> Any:
    from loaders.models import load_model_and_tokenizer

    return load_model_and_tokenizer(DEMO, **settings)


def called(function: Any, *arguments: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: function(*arguments, **settings)


NF4 = {"quantize": "nf4"}
CASES: list[tuple[Callable[[], Any], str]] = [
    (called(weights, quantize="NF4"), "quantize: unknown 'NF4'; did you mean 'nf4'?"),
    (called(weights, quantize="q4_k_m"), "did you mean 'gguf_q4_k_m'?"),
    (called(weights, quantize="gptq"), "read here and not written"),
    (called(weights, quantize="auto"), "only a job (weightmill run) can measure"),
    (called(weights, quantize=4), "quantize: expected a text, or true or false; found 4"),
    (called(weights, dtype="bf16"), "did you mean 'bfloat16'?"),
    (called(weights, dtype="half"), "did you mean 'float16'?"),
    (called(weights, device="gpu"), "did you mean 'cuda'?"),
    (called(weights, device=None), "device: expected a text"),
    (called(weights, layer_filter=3), "layer_filter: expected a text, or a list; found 3"),
    (called(weights, layer_filter=[1]), "layer_filter[0]: expected a text; found 1"),
    (called(weights, torch_dtype="float16"), "torch_dtype: no such setting; did you mean 'dtype'?"),
    (called(weights, group_size=64, **NF4), "settings={'group_size': ...}"),
    (called(weights, blocksize=64, **NF4), "settings={'group_size': ...}"),
    (called(weights, settings={"blocksize": 64}, **NF4), "did you mean 'group_size'?"),
    (called(weights, settings={"group_size": "x"}, **NF4), "group_size: expected a whole number"),
    (called(weights, settings=["x"], **NF4), "settings: expected names with values"),
    (called(weights, load_in_4bit=True), "did you mean 'quantize'?"),
    (called(weights, trust_remote_code=True), "never run"),
    (called(weights, strategy="mmap"), "did you mean 'lazy'?"),
    (called(weights, strategy=None), "strategy: expected a text"),
    (called(weights, backend="gpu"), "backend: expected cpu, cuda, mps or mlx; did you mean 'cuda'?"),
    (called(weights, use_cache="yes"), "use_cache: expected true or false"),
    (called(weights, max_relative_error=-1), "max_relative_error: expected more than 0"),
    (called(weights, expected_shapes={"a": [1, "x"]}), "expected_shapes.a[1]: expected a whole number"),
    (called(load_and_quantize, DEMO, {"quantise": "nf4"}), "did you mean 'quantize'?"),
    (called(LoadConfig, quantize=["nf4"]), "quantize: expected a text, or true or false; found ['nf4']"),
    (called(preset, "Q8_0"), "did you mean 'gguf_q8_0'?"),
    (called(preset, "nf4", bits=4), "nf4: bits: no such setting"),
    (called(preset, "hqq4", bits=7), "bits: expected 8, 4, 3, 2 or 1; found 7"),
    (called(preset, None), "expected a name, found None"),
    (called(loader, "Lazy"), "strategy: unknown 'Lazy'; did you mean 'lazy'?"),
    (called(loader, "streaming", budget=64), "did you mean 'memory_budget_mb'?"),
    (called(loader, "streaming", memory_budget_mb="64"), "memory_budget_mb: expected a number, found '64'"),
    (called(loader, "remote", memory_budget_mb=3), "memory_budget_mb: expected at least"),
    (called(loader, "multithread", max_workers="4"), "max_workers: expected a whole number, found '4'"),
    (called(configure, workers="2"), "workers: expected a whole number, found '2'"),
    (called(get_recommended_loader_config, DEMO, "gpu", 24), "backend: unknown 'gpu'; did you mean 'cuda'?"),
    (called(get_recommended_loader_config, DEMO, "cpu", "24"), "expected a number, found '24'"),
    (called(models, device="gpu"), "device: unknown 'gpu'; did you mean 'cuda'?; known: cpu, cuda, mps, mlx, cuda:N"),
    (called(models, backend="mps", device="cuda:1"), "device: cuda:1 is none of backend=mps; give backend='cuda'"),
    (called(models, device_map="auto"), "give backend='auto' (known: auto, cpu, cuda, mps, mlx), or max_memory"),
    (called(models, quantize="NF4"), "did you mean 'nf4'?"),
    (called(models, quantize="w4a16"), "A job (weightmill run) writes it"),
    (called(models, quantize="awq"), "read here and not written"),
    (called(models, quantize=4), "quantize: expected a preset's name"),
    (called(models, load_in_4bit=True), "give quantize='nf4'"),
    (called(models, load_in_8bit=True), "give quantize='int8'"),
    (called(models, torch_dtype="bf16"), "did you mean 'dtype'?"),
    (called(models, attn_implementation="eager", attention="sdpa"), "they are one setting: give one"),
    (called(models, dtype="bf16"), "did you mean 'bfloat16'?"),
    (called(models, backend="cuda:0"), "did you mean 'cuda'?"),
    (called(models, strategy="stream"), "did you mean 'streaming'?"),
    (called(models, workers="2"), "workers: expected a whole number"),
    (called(models, memory_budget_mb="2GB"), "memory_budget_mb: expected a number"),
    (called(models, max_memory="2GB"), "max_memory: expected such as {'cpu': '8GB'}"),
    (called(models, config={"dtype": "bf16"}), "config: expected a ModelLoadingConfig"),
    (called(models, revision="main"), "hf://OWNER/NAME@REVISION"),
]


@pytest.mark.parametrize(("call", "said"), CASES)
def test_a_near_miss_says_what_to_give(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(BadSpec) as caught:
        call()
    assert said in str(caught.value)
    assert not INNER.search(str(caught.value)), caught.value


def test_torchs_own_objects_stand_for_their_names() -> None:
    from loaders.models import ModelLoadingConfig

    dtype: Any = torch.bfloat16
    assert ModelLoadingConfig(dtype=dtype).dtype == "bfloat16"
    found, _ = weights(device=torch.device("cpu"), dtype=torch.float16, layer_filter=["model.norm"])
    assert {weight.dtype for weight in found.values()} == {torch.float16}


def test_lists_are_as_good_as_tuples() -> None:
    shapes = {"model.norm.weight": [256]}
    found, _ = load_and_quantize(DEMO, {"layer_filter": ["model.norm"], "expected_shapes": shapes})
    assert list(found) == ["model.norm.weight"]
