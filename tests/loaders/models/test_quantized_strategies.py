"""Quantized weights by every strategy: encoded on the way and from outputs, with the logits of FULL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loaders.loading.resources
from loaders import configure
from loaders.errors import BadSpec
from loaders.models import (
    LoadingStrategy,
    QuantizationConfig,
    QuantizationMethod,
    load_model_and_tokenizer,
    weights,
)
from loaders.places import DEMO
from tests import tiny_models
from tests.conftest import Ran

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("hqq")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
IDS = torch.arange(3, 20)[None]
OTHERS = [strategy for strategy in LoadingStrategy if strategy is not LoadingStrategy.FULL]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads and a cache of each test's own."""
    monkeypatch.setattr(loaders.loading.resources, "_SHARED", [])
    configure(workers=1, cache_folder=tmp_path / "cache")


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits


def load(path: Path, strategy: LoadingStrategy | None = None, **settings: Any) -> Any:
    return load_model_and_tokenizer(path, "cpu", strategy=strategy, **settings)[0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, a Qwen2 with biases, and tiny models of other kinds: experts, and head and embedding in one."""
    folder = tmp_path_factory.mktemp("sources")
    config = transformers.Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    qwen = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in qwen.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    qwen.save_pretrained(folder / "qwen2")
    tiny = {kind: tiny_models.make(kind, folder / kind) for kind in ("gemma2", "glm4_moe")}
    return {"llama": DEMO, "qwen2": folder / "qwen2", **tiny}


# A group of 32 divides the tiny models' columns; bitsandbytes' 4 bits have no such models on a CPU with AVX512-BF16.
CASES: list[tuple[str, Any]] = [
    ("llama", "hqq4"),
    ("llama", QuantizationConfig(QuantizationMethod.BNB_FP4, group_size=128, compute_dtype="float32")),
    ("qwen2", "nf4"),
    ("qwen2", QuantizationConfig("hqq", 3, 32)),
    ("gemma2", "int8"),
    ("glm4_moe", QuantizationConfig("hqq", 4, 32)),
]


@pytest.mark.parametrize(("name", "quantize"), CASES)
def test_every_strategy_quantizes_on_the_way_to_the_logits_of_full(
    name: str, quantize: Any, sources: dict[str, Path]
) -> None:
    # The layer for multi-token prediction, which transformers has no modules for.
    settings = {"quantize": quantize, "ignore_unexpected": (r"^model\.layers\.3\.",) if name == "glm4_moe" else ()}
    wanted = logits(load(sources[name], **settings))
    for strategy in OTHERS:
        assert torch.equal(logits(load(sources[name], strategy, **settings)), wanted), strategy


# Outputs whose modules are made here, whose modules MLX has, and whose modules transformers makes itself.
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("quant", ["nf4", "hqq4", "mlx_int4", "w8a16"])
def test_every_strategy_takes_our_outputs(quant: str, tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    if quant == "w8a16":
        pytest.importorskip("compressed_tensors")
    output = tmp_path / "out"
    nested = ["quant.double_quant=true", "quant.storage_dtype=bfloat16"] if quant == "nf4" else []
    ran = weightmill("run", "model=demo", f"quant={quant}", *nested, "cluster=local", f"output.path={output}")
    assert ran.status == 0, ran.err
    wanted, decoded = logits(load(output)), logits(load(output, decode=True))
    for strategy in OTHERS:
        model = load(output, strategy)
        found, floats = logits(model), logits(load(output, strategy, decode=True))
        assert torch.equal(floats, decoded), strategy
        # What has modules of transformers' own alone is decoded by STREAMING, which differs by roundings.
        is_decoded = quant == "w8a16" and strategy is LoadingStrategy.STREAMING
        assert torch.equal(found, decoded if is_decoded else wanted), strategy
        if strategy is LoadingStrategy.STREAMING and quant in ("nf4", "hqq4"):
            packed = sum(p.stat().st_size for p in [*output.glob("*.safetensors"), *output.glob("qmodel.pt")])
            assert 0 < model.streamer.peak_bytes < packed
    assert (decoded - wanted).float().abs().max() < 0.3


@pytest.mark.parametrize("quantize", ["nf4", "hqq4"])
def test_streaming_encodes_once_and_holds_what_is_packed(quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    real = weights.ModelWeights._made

    def made(self: Any, encoding: Any, stored: Any) -> Any:
        encoded.append(encoding.tensor.name)
        return real(self, encoding, stored)

    monkeypatch.setattr(weights.ModelWeights, "_made", made)
    # Of the demo, a block takes 1.4 MB in bfloat16; so a budget of two packed blocks has no room for a plain one.
    block = 2 * 256 * (2 * 256 + 2 * 64 + 3 * 768)
    budget = int(block * 0.65)
    first = load(DEMO, LoadingStrategy.STREAMING, quantize=quantize, memory_budget_mb=budget / 1e6)
    assert len(encoded) == len(set(encoded)) == 3 * 7
    wanted = logits(first)
    assert torch.equal(logits(first), wanted)
    assert 0 < first.streamer.peak_bytes <= budget < block
    first.streamer.close()
    second = load(DEMO, LoadingStrategy.STREAMING, quantize=quantize)
    assert torch.equal(logits(second), wanted)
    assert torch.equal(logits(load(DEMO, quantize=quantize, use_cache=True)), wanted)
    assert len(encoded) == 3 * 7  # by the first load alone


def test_a_streamed_layer_lets_its_module_go_and_generates(sources: dict[str, Path]) -> None:
    ids = IDS[:, :4]
    options = {"max_new_tokens": 4, "do_sample": False}
    wanted = load(sources["qwen2"], quantize="nf4").generate(ids, **options)
    model = load(sources["qwen2"], LoadingStrategy.STREAMING, quantize="nf4")
    assert torch.equal(model.generate(ids, **options), wanted)
    assert all(layer.mlp.up_proj.engine is None for layer in model.model.layers)
    assert all(parameter.is_meta for parameter in model.parameters())
    seen = []
    up = model.model.layers[0].mlp.up_proj
    up.register_forward_hook(lambda module, given, out: seen.append(type(module.engine).__name__))
    logits(model)
    assert seen == ["Linear4bit"]


def test_a_group_beyond_the_budget_is_refused_before_anything_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.ModelWeights, "_made", lambda *given: pytest.fail("the work began"))
    with pytest.raises(BadSpec, match=r"memory_budget_mb: lm_head alone takes 0.5 MB"):
        load(DEMO, LoadingStrategy.STREAMING, quantize="nf4", memory_budget_mb=0.1)


@pytest.mark.parametrize("quantize", ["nf4", "int8", "hqq4"])
def test_of_several_processes_the_first_quantizes_and_the_others_hold_meta(quantize: str) -> None:
    """Without a group: rank and world size are what is given."""
    first = load(DEMO, LoadingStrategy.LOW_MEMORY, quantize=quantize, rank=0, world_size=2)
    other = load(DEMO, quantize=quantize, low_memory=True, rank=1, world_size=2)
    assert torch.equal(logits(first), logits(load(DEMO, quantize=quantize)))
    assert all(parameter.is_meta for parameter in other.parameters())
    theirs = {name: (type(m).__name__) for name, m in other.named_modules()}
    assert theirs == {name: (type(m).__name__) for name, m in first.named_modules()}
    shapes = {name: (p.shape, p.dtype) for name, p in other.named_parameters()}
    if quantize == "nf4":  # whose weights bitsandbytes repacks at their first use on some CPUs
        first = load(DEMO, LoadingStrategy.LOW_MEMORY, quantize=quantize, rank=0, world_size=2)
    assert shapes == {name: (p.shape, p.dtype) for name, p in first.named_parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", list(LoadingStrategy))
@pytest.mark.parametrize("quantize", ["nf4", "int8", "hqq4"])
def test_every_strategy_quantizes_onto_a_gpu(strategy: LoadingStrategy, quantize: str) -> None:
    """Models that run there, LOW_MEMORY's among them, which one process has on its device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    ids = IDS.to("cuda")
    with torch.no_grad():
        wanted = load_model_and_tokenizer(DEMO, "cuda", quantize=quantize)[0](ids).logits
        found = load_model_and_tokenizer(DEMO, "cuda", quantize=quantize, strategy=strategy)[0](ids).logits
    assert torch.equal(found, wanted)
