"""Held against bitsandbytes itself: the same bytes from its quantizer, the same checkpoint, the same logits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.backends.machine import has_avx512_bf16
from loaders.backends.threads import Crew, ThreadedWork
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.quantization.scheme import Scheme, View
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.tensors.quantized_sources import quantized_tensors
from tests.encoding import MemorySink, MemoryView
from tests.making import Raw
from tests.quick import some_quick
from tests.reading import files_of

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")
transformers = pytest.importorskip("transformers")

from loaders.models.quantized_modules import repacks_4bit, unusable_4bit  # noqa: E402

pytestmark = pytest.mark.engine

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def raw_of(tensor: Any, dtype: str) -> Raw:
    data = tensor.view(torch.uint16) if dtype == "BF16" else tensor
    return Raw(dtype, data.numpy())


def encode(view: View, scheme: Scheme) -> dict[str, np.ndarray]:
    sink = MemorySink(scheme, view.spec)
    with Crew(1) as crew:
        scheme.encode(view, sink, ThreadedWork(kernels_of("cpu"), crew, threading.Event()))
    return sink.stored


def awkward() -> Any:
    """Rows ordinary, zero, minus zero, tiny, huge, sparse, one-signed, constant, with ties; NaN and infinities."""
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((40, 256)) * 0.02).astype(np.float32)
    rows[0] = 0
    rows[1, :64] = -0.0
    rows[2] *= 1e-30
    rows[3] *= 1e20
    rows[4, ::7] = 0
    rows[5] = np.abs(rows[5])
    rows[6] = -np.abs(rows[6])
    rows[7, 5::64] = 0.5
    rows[7, 9::64] = -0.5
    rows[8] = np.round(rows[8] * 256) / 256
    rows[9] = 0.01
    rows[10] *= 1e-36
    rows[11, 3::64] *= 100
    rows[12] *= 1e-43
    rows[13, 3], rows[13, 60], rows[14, 70], rows[15, 130] = np.nan, np.nan, np.inf, -np.inf
    return torch.from_numpy(rows)


@pytest.mark.parametrize("group", [32, 64, 128, 4096])
@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", ["awkward", (256, 320), (67, 61), (1, 1)])
def test_codes_and_scales_are_those_of_quantize_4bit(table: Any, dtype: str, group: int, shape: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = awkward() if shape == "awkward" else torch.randn(shape, generator=generator) * 0.02
    tensor = tensor.to(TORCH_DTYPES[dtype])
    codes, state = functional.quantize_4bit(tensor, blocksize=group, quant_type=table)
    mine = encode(MemoryView(raw_of(tensor, dtype)), Bnb4(table, group))
    assert np.array_equal(mine["weight"], codes.numpy().reshape(-1))
    # equal_nan: the bits of a NaN scale are the CPU's own
    assert np.array_equal(mine["weight.absmax"], state.absmax.numpy(), equal_nan=True)
    assert np.array_equal(mine["weight.quant_map"], state.code.numpy())


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_double_quantization_differs_by_the_mean_alone(table: Any) -> None:
    """bitsandbytes' mean depends on its machine: given the same mean, the rest is the same."""
    tensor = torch.randn(512, 300, generator=torch.Generator().manual_seed(1)) * 0.02
    codes, state = functional.quantize_4bit(tensor, quant_type=table, compress_statistics=True)
    mine = encode(MemoryView(raw_of(tensor, "F32")), Bnb4(table, double_quant=True))
    assert np.array_equal(mine["weight"], codes.numpy().reshape(-1))
    assert np.allclose(mine["weight.nested_absmax"], state.state2.absmax.numpy(), rtol=1e-5)
    unlike = mine["weight.absmax"] != state.absmax.numpy()
    assert unlike.mean() < 1e-3  # where a scale lies on the edge of two codes
    offset = float(state.offset)
    assert abs(offset - float(tensor.abs().reshape(-1, 64).amax(1).double().mean())) < 1e-6 * offset


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("shape", ["awkward", (96, 320), (67, 61), (1, 1)])
def test_int8_codes_and_scales_are_those_of_int8_vectorwise_quant(dtype: str, shape: Any) -> None:
    if shape == "awkward":
        tensor = awkward()
        tensor[3] *= 1e-20  # finite ones beyond float16 are refused
    else:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    tensor = tensor.to(TORCH_DTYPES[dtype])
    codes, scales, _ = functional.int8_vectorwise_quant(tensor.to(torch.float16))
    mine = encode(MemoryView(raw_of(tensor, dtype)), LlmInt8())
    assert np.array_equal(mine["SCB"], scales.numpy(), equal_nan=True)
    assert np.array_equal(mine["weight"], codes.numpy().reshape(-1))


def causal(prefix: str, **extra: Any) -> Any:
    config = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128, **extra,
    }  # fmt: skip
    return getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**config))


def gemma() -> Any:
    config = transformers.Gemma3TextConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32,
                                           num_attention_heads=4, num_key_value_heads=2, vocab_size=320)  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                                     vocab_size=320)  # fmt: skip
    return transformers.BertModel(config)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
MLA = {"n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64,
       "first_k_dense_replace": 1, "n_shared_experts": 1, "kv_lora_rank": 32, "q_lora_rank": None, "v_head_dim": 32,
       "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
CASES: dict[str, tuple[Any, Any, str, bool]] = {
    "llama untied bf16 nf4": (lambda: causal("Llama"), torch.bfloat16, "nf4", False),
    "llama tied fp16 nf4": (lambda: causal("Llama", tie_word_embeddings=True), torch.float16, "nf4", False),
    "llama untied fp32 fp4": (lambda: causal("Llama"), torch.float32, "fp4", False),
    "llama tied bf16 nf4 double": (lambda: causal("Llama", tie_word_embeddings=True), torch.bfloat16, "nf4", True),
    "llama tied bf16 fp4": (lambda: causal("Llama", tie_word_embeddings=True), torch.bfloat16, "fp4", False),
    "mistral fp16 fp4": (lambda: causal("Mistral"), torch.float16, "fp4", False),
    "qwen2 tied bf16": (lambda: causal("Qwen2", tie_word_embeddings=True), torch.bfloat16, "nf4", False),
    "qwen3 bf16": (lambda: causal("Qwen3", head_dim=32), torch.bfloat16, "nf4", False),
    "mixtral bf16": (lambda: causal("Mixtral", num_local_experts=4), torch.bfloat16, "nf4", False),
    "llama untied bf16 int8": (lambda: causal("Llama"), torch.bfloat16, "int8", False),
    "llama tied fp16 int8": (lambda: causal("Llama", tie_word_embeddings=True), torch.float16, "int8", False),
    "qwen3 moe fp32 int8": (lambda: causal("Qwen3Moe", **MOE), torch.float32, "int8", False),
    "bert fp32 int8": (bert, torch.float32, "int8", False),
    "odd sizes bf16 int8": (lambda: causal("Llama", hidden_size=200, intermediate_size=330, num_attention_heads=5,
                                           num_key_value_heads=5), torch.bfloat16, "int8", False),
    "gpt-oss bf16": (lambda: causal("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=32), torch.bfloat16,
                     "nf4", False),
    "deepseek v2 bf16": (lambda: causal("DeepseekV2", **MLA), torch.bfloat16, "nf4", False),
    "gemma 3 tied bf16": (gemma, torch.bfloat16, "nf4", False),
    "qwen3 moe bf16": (lambda: causal("Qwen3Moe", **MOE), torch.bfloat16, "nf4", False),
    "bert fp32": (bert, torch.float32, "nf4", False),
    "odd sizes fp16 fp4": (lambda: causal("Llama", hidden_size=200, intermediate_size=330, num_attention_heads=5,
                                          num_key_value_heads=5), torch.float16, "fp4", False),
    "qwen3 moe fp32 fp4": (lambda: causal("Qwen3Moe", **MOE), torch.float32, "fp4", False),
    "odd sizes bf16": (lambda: causal("Llama", hidden_size=200, intermediate_size=330, num_attention_heads=5,
                                      num_key_value_heads=5), torch.bfloat16, "nf4", False),
}  # fmt: skip


def stored(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def logits(model: Any) -> Any:
    ids = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize("case", some_quick(sorted(CASES), "llama tied bf16 nf4 double", "odd sizes bf16"))
def test_the_checkpoint_is_that_of_transformers_with_bitsandbytes(case: str, tmp_path: Path, weightmill: Any) -> None:
    make, dtype, table, double = CASES[case]
    torch.manual_seed(0)
    made = make().to(dtype)
    made.save_pretrained(tmp_path / "source", max_shard_size="200KB")
    auto = transformers.AutoModel if case.startswith("bert") else transformers.AutoModelForCausalLM
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=table, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=double
    )
    if table == "int8":
        settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    peer = auto.from_pretrained(tmp_path / "source", quantization_config=settings, device_map={"": "cpu"}, dtype=dtype)
    peer.save_pretrained(tmp_path / "peer")
    ran = weightmill(
        "run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", f"quant={table}",
        "unit_mb=0.3", *([] if table == "int8" else [f"quant.double_quant={str(double).lower()}"]),
    )  # fmt: skip
    assert ran.status == 0, ran.err

    ours, theirs = stored(tmp_path / "out"), stored(tmp_path / "peer")
    assert set(ours) == set(theirs)
    assert [name for name in ours if not same(ours[name], theirs[name])] == []
    from loaders.checkpoints.derived_config import read_config

    blocks = [read_config(files_of(tmp_path / d))["quantization_config"] for d in ("out", "peer")]
    assert blocks[0] == blocks[1]
    model, info = auto.from_pretrained(tmp_path / "out", device_map={"": "cpu"}, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = auto.from_pretrained(tmp_path / "peer", device_map={"": "cpu"})
    # Where the CPU's own kernel does not take a matrix, the library stops at both, and we say so beforehand.
    foretold = unusable_4bit(
        (r.spec, r.decode, "cpu") for r in quantized_tensors(open_checkpoint(tmp_path / "out")).values()
    )
    found, wanted = outcome(model), outcome(again)
    assert isinstance(wanted, str) == (foretold is not None), (wanted, foretold)
    assert found == wanted if foretold else torch.equal(found, wanted)


def outcome(model: Any) -> Any:
    """Its logits, or what the library says when it stops."""
    try:
        return logits(model)
    except (AssertionError, RuntimeError) as error:
        return str(error)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(64, 128), (48, 128), (64, 96), (64, 65), (96, 330), (32, 32), (33, 1)])
def test_which_matrices_its_cpu_kernel_takes_is_foretold(shape: tuple[int, int], group: int) -> None:
    """It repacks with torch alone, so any machine can tell."""
    repack = getattr(functional, "_convert_weight_packed_for_cpu", None)
    if repack is None:
        pytest.skip("this version of bitsandbytes repacks nothing")
    codes, state = functional.quantize_4bit(torch.randn(shape), blocksize=group, quant_type="nf4")
    stops = Bnb4("nf4", group).stops_cpu_kernel(shape)
    if stops is None:
        repack(codes, state)
        return
    with pytest.raises((AssertionError, RuntimeError), match="must be divisible|must be even|is invalid for input"):
        repack(codes, state)


def test_the_machine_is_told_as_the_library_tells_it() -> None:
    assert has_avx512_bf16() == repacks_4bit("cpu") == functional.has_avx512bf16()
    assert not repacks_4bit("cuda:0")


def test_a_gate_that_transformers_would_quantize_stays_by_the_skip_list(tmp_path: Path, weightmill: Any) -> None:
    """Qwen2-MoE's shared_expert_gate is one row that decides; transformers by itself makes it 4-bit."""
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    causal("Qwen2Moe", shared_expert_intermediate_size=64, **sizes).to(torch.bfloat16).save_pretrained(tmp_path / "s")
    ran = weightmill("run", f"model.path={tmp_path / 's'}", f"output.path={tmp_path / 'out'}", "quant=nf4")
    assert ran.status == 0, ran.err
    gate = "model.layers.1.mlp.shared_expert_gate.weight"
    assert same(stored(tmp_path / "out")[gate], stored(tmp_path / "s")[gate])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.model.layers[1].mlp.shared_expert_gate.weight, stored(tmp_path / "s")[gate])


def test_pytorch_and_safetensors_sources_give_the_same_output(tmp_path: Path, weightmill: Any) -> None:
    torch.manual_seed(0)
    model = causal("Llama", tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for kind in ("safe", "bin"):
        ran = weightmill("run", f"model.path={tmp_path / kind}", f"output.path={tmp_path / (kind + '-out')}")
        assert ran.status == 0, ran.err
    one, other = ((tmp_path / f"{kind}-out" / "model.safetensors").read_bytes() for kind in ("safe", "bin"))
    assert one == other


def test_a_rule_that_keeps_a_layer_reaches_the_skip_list_and_loads(tmp_path: Path, weightmill: Any) -> None:
    torch.manual_seed(0)
    causal("Llama").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    ran = weightmill(
        "run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}",
        "rules=[{name: layers.0.*down_proj, action: keep}]",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "Linear"
    assert type(model.model.layers[1].mlp.down_proj).__name__ == "Linear4bit"
    assert torch.isfinite(logits(model)).all()


def test_packed_bytes_may_pretend_to_be_bfloat16(tmp_path: Path, weightmill: Any) -> None:
    torch.manual_seed(0)
    causal("Llama").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=settings, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    peer.save_pretrained(tmp_path / "peer")
    ran = weightmill(
        "run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", "quant.storage_dtype=bfloat16"
    )
    assert ran.status == 0, ran.err
    ours, theirs = stored(tmp_path / "out"), stored(tmp_path / "peer")
    assert set(ours) == set(theirs)
    unlike = [n for n in ours if not same(ours[n].view(torch.uint8), theirs[n].view(torch.uint8))]
    assert unlike == []


def llama4(root: Path) -> Any:
    torch.manual_seed(0)
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "head_dim": 64}
    config = transformers.Llama4TextConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=320, pad_token_id=0, interleave_moe_layer_step=2, **sizes,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(root)
    return model


@pytest.mark.parametrize(("quant", "most"), [("nf4", 0.25), ("int8", 0.04)])
def test_experts_of_a_llama_4_are_quantized_one_by_one_as_its_loader_has_them(
    quant: str, most: float, tmp_path: Path, weightmill: Any
) -> None:
    """transformers makes a linear layer of each expert matrix once it reads of bitsandbytes, and so cannot load what it
    saves itself, which are the stacks. There is no output of its own to compare with, but there is each matrix.
    """
    plain = llama4(tmp_path / "source")
    ran = weightmill("run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", f"quant={quant}")
    assert ran.status == 0, ran.err
    assert "one by one" not in ran.err
    ours, stacks = stored(tmp_path / "out"), plain.model.layers[1].feed_forward.experts
    for expert in range(2):
        gate, up = stacks.gate_up_proj[expert].T.chunk(2)
        for part, matrix in {"gate": gate, "up": up, "down": stacks.down_proj[expert].T}.items():
            if quant == "nf4":
                codes = functional.quantize_4bit(matrix.contiguous(), blocksize=64, quant_type="nf4")[0]
            else:
                codes = functional.int8_vectorwise_quant(matrix.contiguous().to(torch.float16))[0]
            assert torch.equal(ours[f"model.layers.1.feed_forward.experts.{expert}.{part}_proj.weight"], codes)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found, wanted = logits(model).float(), logits(plain).float()
    assert ((found - wanted).norm() / wanted.norm()).item() < most
    from loaders.models import load_model_and_tokenizer

    assert torch.equal(logits(load_model_and_tokenizer(tmp_path / "out", "cpu")[0]).float(), found)


def test_a_llama_4_as_transformers_saves_it_is_a_fault_to_lint(tmp_path: Path, weightmill: Any) -> None:
    """Once a version of transformers loads it, this fails, and the experts are to be looked at again."""
    llama4(tmp_path / "source")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    peer = load(tmp_path / "source", quantization_config=settings, device_map={"": "cpu"}, dtype=torch.bfloat16)
    peer.save_pretrained(tmp_path / "peer")
    with pytest.raises(NotImplementedError, match="normal_kernel_cpu"):
        load(tmp_path / "peer", device_map={"": "cpu"})
    linted = weightmill("lint", tmp_path / "peer", "format=json")
    assert linted.status == 1
    assert any("2 stacks of experts" in finding["what"] for finding in linted.document["findings"])
