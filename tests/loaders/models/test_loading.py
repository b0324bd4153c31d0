"""Models loaded by us hold and compute what transformers' own loading does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec
from loaders.models import LoadingStrategy, ModelLoadingConfig, load_model_and_tokenizer, loading, opening
from loaders.models.skeleton import EmptyOnMeta
from loaders.places import DEMO
from tests.conftest import Ran
from tests.making import LLAMA, Raw, llama_tensors, weights, write_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

IDS = torch.arange(3, 40)[None]


def logits(model: Any, ids: Any = IDS) -> Any:
    with torch.no_grad():
        return model(ids).logits


def load(path: Path, **settings: Any) -> Any:
    return load_model_and_tokenizer(path, "cpu", **settings)[0]


@pytest.fixture(scope="module")
def peer() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO).eval()


def plain(folder: Path, **changes: Any) -> Path:
    tensors = llama_tensors()
    tensors.update(changes.pop("tensors", {}))
    for name in changes.pop("without", ()):
        del tensors[name]
    made = write_checkpoint(folder, tensors, config={**LLAMA, "dtype": "bfloat16", **changes}, shards=2)
    (made / "tokenizer.json").unlink()  # which is none that transformers reads
    return made


@pytest.mark.quick
@pytest.mark.parametrize("strategy", list(LoadingStrategy))
def test_every_strategy_gives_the_logits_of_from_pretrained(strategy: LoadingStrategy, peer: Any) -> None:
    model, tokenizer = load_model_and_tokenizer(DEMO, "cpu", strategy=strategy)
    assert torch.equal(logits(model), logits(peer))
    assert tokenizer("the")["input_ids"]
    if strategy is not LoadingStrategy.STREAMING:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        theirs = peer.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("strategy", [s for s in LoadingStrategy if s is not LoadingStrategy.STREAMING])
def test_one_process_gets_its_weights_where_it_wants_them(
    strategy: LoadingStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, which need not be here: what would fill the model says where to."""
    places = []
    monkeypatch.setattr(
        loading, "fill_model", lambda skeleton, weights, schemes, device_of, _: places.append(device_of)
    )
    monkeypatch.setattr(opening, "torch_device", lambda name: None)
    load_model_and_tokenizer(DEMO, "cuda", strategy=strategy)
    load_model_and_tokenizer(DEMO, device="cuda:1", strategy=strategy)
    load_model_and_tokenizer(DEMO, "cuda", strategy=strategy, offload_to_cpu=True)
    load_model_and_tokenizer(DEMO, "cuda", strategy=strategy, rank=0, world_size=2)
    of_several = "cpu" if strategy is LoadingStrategy.LOW_MEMORY else "cuda"
    assert [device_of("model.norm.weight") for device_of in places] == ["cuda", "cuda:1", "cpu", of_several]


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", list(LoadingStrategy))
def test_models_on_a_gpu_compute_what_transformers_computes_there(strategy: LoadingStrategy) -> None:
    """In float32: kernels may add in another order where a weight's memory is aligned otherwise, and no more."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval().to("cuda")
    wanted = logits(theirs, IDS.to("cuda"))
    model = load_model_and_tokenizer(DEMO, "cuda", strategy=strategy, dtype="float32")[0]
    assert (logits(model, IDS.to("cuda")) - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("strategy", [LoadingStrategy.FULL, LoadingStrategy.STREAMING])
def test_generate_is_that_of_from_pretrained(strategy: LoadingStrategy, peer: Any) -> None:
    wanted = peer.generate(IDS[:, :5], max_new_tokens=8, do_sample=False)
    assert torch.equal(load(DEMO, strategy=strategy).generate(IDS[:, :5], max_new_tokens=8, do_sample=False), wanted)


@pytest.mark.parametrize(("dtype", "attention"), [("float32", "eager"), ("float16", None)])
def test_dtype_and_attention_are_those_of_from_pretrained(dtype: str, attention: str | None) -> None:
    options = {} if attention is None else {"attn_implementation": attention}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=getattr(torch, dtype), **options).eval()
    ours = load(DEMO, dtype=dtype, attention=attention)
    assert ours.dtype == getattr(torch, dtype)
    assert torch.equal(logits(ours), logits(theirs))


def test_a_skeletons_weights_have_no_values_and_its_buffers_do() -> None:
    with EmptyOnMeta():
        linear, buffer = torch.nn.Linear(3, 2), torch.zeros(4)
        torch.nn.init.ones_(buffer)
        assert torch.nn.init.normal_(linear.weight) is linear.weight
        assert linear.bias.zero_() is linear.bias
    assert linear.weight.is_meta
    assert linear.bias.is_meta
    assert buffer.tolist() == [1, 1, 1, 1]


def test_weights_that_the_config_ties_but_differ_stay_apart(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m", tie_word_embeddings=True)
    model = load(folder)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_experts_are_fused_as_transformers_fuses_them(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    mixtral = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    for each in (config, mixtral):
        torch.manual_seed(0)
        folder = tmp_path / each.model_type
        transformers.AutoModelForCausalLM.from_config(each).save_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        for strategy in (LoadingStrategy.FULL, LoadingStrategy.STREAMING):
            assert torch.equal(logits(load(folder, strategy=strategy)), logits(theirs)), (each.model_type, strategy)


@pytest.mark.parametrize(
    ("kind", "dtype", "kept"),
    [("deepseek_v3", "bfloat16", "mlp.gate.e_score_correction_bias"), ("gpt_oss", "float16", "layernorm.weight")],
)
def test_what_transformers_keeps_in_float32_is_so_here(kind: str, dtype: str, kept: str, tmp_path: Path) -> None:
    """DeepSeek's in any dtype (strict), gpt-oss's in float16 alone."""
    few = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    sizes = {
        "deepseek_v3": {
            "intermediate_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
            "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        },
        "gpt_oss": {
            "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2,
            "head_dim": 16,
        },
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **few, **sizes[kind])
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    wanted = {name: value.dtype for name, value in theirs.state_dict().items()}
    assert {dtype for name, dtype in wanted.items() if kept in name} == {torch.float32}
    for strategy in (LoadingStrategy.FULL, LoadingStrategy.STREAMING):
        ours = load(tmp_path, dtype=dtype, strategy=strategy)
        assert {name: value.dtype for name, value in ours.state_dict().items()} == wanted
        assert torch.equal(logits(ours), logits(theirs))


# --- quantized


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_bitsandbytes_modules_compute_as_transformers_loads_our_output(
    scheme: str, tmp_path: Path, weightmill: Callable[..., Ran]
) -> None:
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "out"
    assert weightmill("run", "model=demo", f"quant={scheme}", "cluster=local", f"output.path={output}").status == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output, device_map={"": "cpu"}).eval()
    ours = [load(output), load(DEMO, quantize=scheme)]
    wanted = theirs.model.layers[0].mlp.up_proj
    for linear in (each.model.layers[0].mlp.up_proj for each in ours):
        assert type(linear) is type(wanted)
        assert torch.equal(linear.weight, wanted.weight)  # before they are used: some CPUs repack them then
    assert all(torch.equal(logits(each), logits(theirs)) for each in ours)
    decoded = load(output, strategy=LoadingStrategy.STREAMING, decode=True)
    whole = load(output, decode=True)
    assert torch.equal(logits(decoded), logits(whole))
    assert not torch.equal(logits(whole), logits(load(DEMO)))


@pytest.mark.quick
@pytest.mark.parametrize("repacks", [False, True])
def test_shapes_that_bitsandbytes_stops_at_on_this_cpu_are_refused_before_the_work(
    repacks: bool, tmp_path: Path, weightmill: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("bitsandbytes.functional"), "has_avx512bf16", lambda: repacks)
    rng, changed = np.random.default_rng(0), {}
    for name, shape in (("gate", (144, 64)), ("up", (144, 64)), ("down", (64, 144))):
        for layer in range(2):
            values = rng.standard_normal(shape).astype(np.float32)
            changed[f"model.layers.{layer}.mlp.{name}_proj.weight"] = weights(values, "BF16")
    source = plain(tmp_path / "source", tensors=changed, intermediate_size=144)
    outputs = {name: tmp_path / name for name in ("all", "kept")}
    for output, rules in zip(outputs.values(), ([], ["rules=[{name: mlp, action: keep}]"]), strict=True):
        ran = weightmill("run", f"model.path={source}", "quant=nf4", f"output.path={output}", *rules)
        assert ran.status == 0, ran.err
    assert load(outputs["all"], decode=True) is not None
    assert load(outputs["kept"]) is not None
    if not repacks:
        assert load(outputs["all"]) is not None
        assert load(source, quantize="fp4") is not None
        return
    said = r"mlp.gate_proj.weight \[144, 64\] cannot run in 4 bits on this CPU: its 144 rows are no multiple of 32"
    monkeypatch.setattr("loaders.models.loading.fill_model", lambda *given: pytest.fail("the work began"))
    with pytest.raises(BadSpec, match=f"^backend: model.layers.0.{said}.*; or decode=True loads float weights; or"):
        load(outputs["all"])
    with pytest.raises(BadSpec, match=f"^quantize: model.layers.0.{said}.*; or leave quantize out for float weights"):
        load(source, quantize="fp4")


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8", "hqq4"])
def test_quantized_modules_on_a_gpu_compute_with_the_decoded_weights(
    quant: str, tmp_path: Path, weightmill: Callable[..., Ran]
) -> None:
    """Each engine's own kernel beside plain matrices of the decoded weights: roundings of bfloat16 apart, and int8's
    of activations, a hundredth of their largest.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    output = tmp_path / "out"
    assert weightmill("run", "model=demo", f"quant={quant}", "cluster=local", f"output.path={output}").status == 0
    ids = IDS.to("cuda")
    decoded = load_model_and_tokenizer(output, "cuda", decode=True)[0]
    wanted = logits(decoded, ids).float()
    for folder, settings in ((output, {}), (DEMO, {"quantize": quant})):
        ours = load_model_and_tokenizer(folder, "cuda", **settings)[0]
        assert (logits(ours, ids).float() - wanted).norm() < 0.05 * wanted.norm()


def test_hqq_modules_are_those_of_our_output(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    pytest.importorskip("hqq")
    assert weightmill("run", "model=demo", "quant=hqq4", "cluster=local", f"output.path={tmp_path / 'out'}").status == 0
    from_output, on_the_way = load(tmp_path / "out"), load(DEMO, quantize="hqq4")
    assert type(from_output.model.layers[0].mlp.up_proj).__name__ == "HQQLinear"
    assert torch.equal(logits(from_output), logits(on_the_way))
    close = logits(load(tmp_path / "out", decode=True)).float() - logits(from_output).float()
    assert close.abs().max() < 0.25  # of logits up to 20, each linear rounded to bfloat16 in another order


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("quant", "engine"), [("w8a16", "compressed_tensors"), ("ternary", "transformers")])
def test_outputs_that_transformers_runs_itself_compute_what_it_computes(
    quant: str, engine: str, tmp_path: Path, weightmill: Callable[..., Ran]
) -> None:
    pytest.importorskip(engine)
    output = tmp_path / "out"
    assert weightmill("run", "model=demo", f"quant={quant}", "cluster=local", f"output.path={output}").status == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output, device_map={"": "cpu"}).eval()
    assert torch.equal(logits(load(output)), logits(theirs))


def test_a_gguf_is_loaded_decoded_with_its_tokenizer(
    tmp_path: Path,
    weightmill: Callable[..., Ran],
    peer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    assert weightmill("run", "model=demo", "quant=gguf_q8_0", "cluster=local", f"output.path={output}").status == 0
    model, tokenizer = load_model_and_tokenizer(output, "cpu", dtype="bfloat16")
    difference = logits(model).float() - logits(peer).float()
    assert difference.abs().mean() < 0.1
    text = "The 2nd house, of Mr. Smith's"
    assert tokenizer(text)["input_ids"] == load_model_and_tokenizer(DEMO, "cpu")[1](text)["input_ids"]
    monkeypatch.setattr(loading, "tokenizer_files", lambda checkpoint: {})  # as for a vocabulary of another kind
    assert loading.tokenizer_of(open_checkpoint(output)) is None
    assert "the tokenizer is None: the GGUF's is none that is made into tokenizer.json here; load the" in caplog.text


@pytest.mark.quick
@pytest.mark.parametrize(("kind", "built"), [("Bert", "BertModel"), ("T5", "T5ForConditionalGeneration")])
def test_a_model_that_predicts_no_next_token_is_refused(kind: str, built: str, tmp_path: Path) -> None:
    few = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, **(few if kind == "Bert" else {}))
    getattr(transformers, built)(config).save_pretrained(tmp_path)
    said = f"^name_or_path: expected a causal language model, .*, found model_type '{kind.lower()}', {built}; models of"
    with pytest.raises(BadSpec, match=said):
        load(tmp_path)


# --- what does not fit


@pytest.mark.quick
def test_missing_unexpected_and_misshapen_weights_are_all_listed(tmp_path: Path) -> None:
    tensors = llama_tensors()
    folder = plain(
        tmp_path / "m",
        without=["model.norm.weight"],
        tensors={
            "model.layers.0.mlp.extra.weight": tensors["model.norm.weight"],
            "model.layers.1.mlp.up_proj.weight": Raw("BF16", tensors["model.layers.1.mlp.up_proj.weight"].data[:100]),
        },
    )
    with pytest.raises(BadCheckpoint) as caught:
        load(folder)
    said = str(caught.value)
    assert "1 missing: model.norm.weight" in said
    assert "1 unexpected (ignore_unexpected takes patterns): model.layers.0.mlp.extra.weight" in said
    assert "1 of another shape: model.layers.1.mlp.up_proj.weight [128, 64] from [[100, 64]]" in said


def test_unexpected_weights_may_be_ignored_by_name(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m", tensors={"model.extra.weight": llama_tensors()["model.norm.weight"]})
    assert load(folder, ignore_unexpected=(r"^model\.extra\.",)) is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "tpu"}, "backend: unknown 'tpu'"),
        ({"quantize": "nf3"}, "quantize: unknown 'nf3'; did you mean 'nf4'"),
        ({"dtype": "bf16"}, "dtype: unknown 'bf16'"),
        ({"quantize": "nf4", "decode": True}, "give one"),
        ({"workers": 0}, "workers: expected at least 1"),
        ({"llama_pro_blocks": 1, "llama_pro_path": "x"}, "give it or llama_pro_blocks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        ModelLoadingConfig(**settings)


def test_a_model_beyond_max_memory_is_refused() -> None:
    with pytest.raises(BadSpec, match="max_memory: the model takes 4469248 bytes|max_memory: the model takes"):
        load(DEMO, max_memory={"cpu": "1MB"})
    assert load(DEMO, max_memory={"cpu": "1GB"}) is not None
    with pytest.raises(BadSpec, match="is no size"):
        load(DEMO, max_memory={"cpu": "many"})


def test_a_module_beyond_the_budget_is_refused() -> None:
    with pytest.raises(BadSpec, match=r"alone takes \d+\.\d MB, the budget is 0.01"):
        load(DEMO, strategy=LoadingStrategy.STREAMING, memory_budget_mb=0.01)


def test_streaming_holds_no_more_than_its_budget_and_lets_go(peer: Any) -> None:
    model = load(DEMO, strategy=LoadingStrategy.STREAMING, memory_budget_mb=1.8)
    assert torch.equal(logits(model), logits(peer))
    assert 0 < model.streamer.peak_bytes <= 1.8e6
    assert all(p.is_meta for p in model.parameters())
    model.streamer.close()


# --- block expansion


def test_a_model_expanded_on_the_way_has_the_same_logits(peer: Any) -> None:
    model = load(DEMO, llama_pro_blocks=3)
    assert len(model.model.layers) == 6 == model.config.num_hidden_layers
    assert not model.model.layers[1].mlp.down_proj.weight.any()
    assert torch.equal(logits(model), logits(peer))


def test_an_expanded_checkpoint_takes_the_place_of_its_base(
    tmp_path: Path, weightmill: Callable[..., Ran], peer: Any
) -> None:
    output = tmp_path / "out"
    ran = weightmill("run", "model=demo", "transform=block_expansion", "transform.num_blocks=1", "quant=none",
                     "cluster=local", f"output.path={output}")  # fmt: skip
    assert ran.status == 0, ran.err
    model = load(DEMO, llama_pro_path=output)
    assert len(model.model.layers) == 4
    assert torch.equal(logits(model), logits(peer))
    with pytest.raises(BadSpec, match="expected more than the 3 blocks"):
        load(DEMO, llama_pro_path=DEMO)
    other = shutil.copytree(output, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    with pytest.raises(BadSpec, match="is no expansion of .* vocab_size is 7"):
        load(DEMO, llama_pro_path=other)
