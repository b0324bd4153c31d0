"""Held against llama.cpp itself: ggml's quantizers, llama_model_quantize on whole models, and the logits it computes.

llama.cpp comes as llama-cpp-python; the models are tiny, with the demo model's tokenizer.
"""

from __future__ import annotations

import ctypes
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.containers import gguf
from loaders.dtypes import GGML_BLOCKS, GGML_READ_BLOCKS
from loaders.places import DEMO
from loaders.quantization.read_only.ggml import decode_blocks
from loaders.quantization.schemes.ggml import Ggml
from tests.encoding import MemorySink, MemoryView
from tests.llama_log import errors, listening, load_model
from tests.loaders.quantization.test_ggml_read_only import random_blocks
from tests.making import Raw, values_of, weights
from tests.reading import files_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engine

RUN = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "TQ2_0", "F16", "BF16")  # whose logits are compared
IDS = [0, 17, 400, 33, 5, 902, 77, 250, 13]
FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "TQ2_0": 37, "Q2_K": 10, "Q3_K_M": 12,
              "Q3_K_S": 11, "Q5_0": 8, "Q4_1": 3, "Q5_1": 9, "Q4_K_S": 14, "Q3_K_L": 13, "Q5_K_S": 16,
              "TQ1_0": 36, "MXFP4_MOE": 38, "IQ4_NL": 25, "IQ4_XS": 30, "F16": 1, "BF16": 32}  # fmt: skip


# --- ggml's own quantizers


def awkward() -> np.ndarray:
    """Rows ordinary, zero, of both zeros, tiny, huge, sparse, one-signed, constant, with ties."""
    rows = (np.random.default_rng(3).standard_normal((40, 512)) * 0.02).astype(np.float32)
    rows[0] = 0
    rows[1, :64] = -0.0
    rows[2] *= 1e-30
    rows[3] *= 1e20
    rows[4, ::7] = 0
    rows[5], rows[6] = np.abs(rows[5]), -np.abs(rows[6])
    rows[7, 5::64], rows[7, 9::64] = 0.5, -0.5
    rows[8] = np.round(rows[8] * 256) / 256
    rows[9], rows[10, :256] = 0.01, -0.01
    rows[11, 3::64] *= 100
    for row, scale in enumerate((1e-36, 1e-43, 1e5, 1e-5, 1e-8, 1e-12, 1e-38, 3e-39, 1e-15, 1e-14), 12):
        rows[row] *= scale
    rows[22, ::2] = -0.0
    rows[23, 16:] = 0
    rows[24] = np.sign(rows[24]) * 0.125
    rows[25] = np.abs(rows[25]) + 5
    rows[26] = np.abs(rows[26])
    rows[26, ::32], rows[27], rows[28] = -0.0, -0.0, 0
    rows[28, 3::32] = -0.0
    return rows


def ggml_bytes(name: str, values: np.ndarray) -> np.ndarray:
    """What ggml_quantize_chunk makes of float32 rows."""
    [library] = Path(llama_cpp.__file__).parent.rglob("libggml-base.so")
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    numbers, size = GGML_BLOCKS[name]
    out = np.zeros(values.size // numbers * size, np.uint8)
    quantize(gguf.TYPE_IDS[name], values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
    return out


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", sorted(GGML_BLOCKS))
def test_blocks_are_those_of_ggml(name: str, dtype: str) -> None:
    with np.errstate(over="ignore"):
        raw = weights(awkward(), dtype)
    if dtype == "F16":
        raw = Raw("F16", np.where(np.isfinite(raw.data), raw.data, np.float16(1)))
    view = MemoryView(raw)
    sink = MemorySink(Ggml(name), view.spec)
    with Crew(1) as crew:
        Ggml(name).encode(view, sink, ThreadedWork(kernels_of("cpu"), crew, threading.Event()))
    assert np.array_equal(sink.stored["weight"], ggml_bytes(name, np.ascontiguousarray(values_of(raw))))


def ggml_values(name: str, data: np.ndarray, count: int) -> np.ndarray:
    """What ggml decodes blocks to."""

    class Traits(ctypes.Structure):
        _fields_ = (
            ("name", ctypes.c_char_p), ("numbers", ctypes.c_int64), ("interleave", ctypes.c_int64),
            ("size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
        )  # fmt: skip

    [library] = Path(llama_cpp.__file__).parent.rglob("libggml-base.so")
    traits = ctypes.CDLL(str(library)).ggml_get_type_traits
    traits.restype, traits.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    found = traits(gguf.TYPE_IDS[name]).contents
    assert (found.numbers, found.size) == (GGML_BLOCKS | GGML_READ_BLOCKS)[name]
    out = np.zeros(count, np.float32)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(found.to_float)
    function(data.ctypes.data, out.ctypes.data, count)
    return out


@pytest.mark.parametrize("name", sorted(GGML_BLOCKS | GGML_READ_BLOCKS))
def test_blocks_are_decoded_as_ggml_decodes_them(name: str) -> None:
    if name in GGML_READ_BLOCKS:
        pytest.importorskip("gguf")
    numbers, _ = (GGML_BLOCKS | GGML_READ_BLOCKS)[name]
    data = random_blocks(name, 40)
    out = np.empty(40 * numbers, np.float32)
    decode_blocks(name, data, out)
    assert np.array_equal(out.view(np.uint32), ggml_values(name, data, out.size).view(np.uint32))


# --- whole models


def causal(prefix: str, **extra: Any) -> Any:
    config = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 128, "rope_theta": 500000.0,
        "bos_token_id": 0, "eos_token_id": 1, **extra,
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**config))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "attention_factor": 2.0}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama untied": lambda: causal("Llama", num_hidden_layers=9),
    "llama tied": lambda: causal("Llama", tie_word_embeddings=True, attention_bias=True),
    "llama odd": lambda: causal("Llama", hidden_size=320, intermediate_size=720, num_attention_heads=5,
                                num_key_value_heads=5),
    "llama 3 rope": lambda: causal("Llama", rope_parameters=LLAMA3),
    "llama yarn": lambda: causal("Llama", rope_parameters=YARN, attention_bias=True, mlp_bias=True),
    "mistral": lambda: causal("Mistral", head_dim=32),
    "qwen2 tied": lambda: causal("Qwen2", tie_word_embeddings=True),
    "qwen3": lambda: causal("Qwen3", head_dim=32, num_hidden_layers=4),
    "qwen3 moe": lambda: causal("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256,
                                head_dim=64, norm_topk_prob=True),
    "mixtral": lambda: causal("Mixtral", num_local_experts=8, num_experts_per_tok=2, num_hidden_layers=4),
}  # fmt: skip


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")

    def source(name: str) -> Path:
        if name == "demo":
            return DEMO
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            MODELS[name]().to(torch.bfloat16).save_pretrained(folder, max_shard_size="900KB")
            with_tokenizer(folder)
        return folder

    return source


def made(weightmill: Any, source: Path, out: Path, *settings: str) -> Path:
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", "unit_mb=1", *settings)
    assert ran.status == 0, ran.err
    [file] = sorted(out.glob("*.gguf"))[:1]
    return file


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = path.read_bytes()
    return {
        s.name: (s.dtype.name, s.shape, data[s.offset : s.offset + s.size])
        for s in gguf.read_specs(files_of(path.parent), path.name)
    }


def metadata_of(path: Path) -> dict[str, Any]:
    return gguf.plain(gguf.read_metadata(files_of(path.parent), path.name))


def llama_quantize(base: Path, out: Path, file_type: str, *, pure: bool = False, again: bool = False) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.allow_requantize = again
    params.ftype, params.pure, params.nthread = FILE_TYPES[file_type], pure, 1
    with listening() as said:
        status = llama_cpp.llama_model_quantize(str(base).encode(), str(out).encode(), ctypes.byref(params))
    assert status == 0, errors(said)


def logits(path: Path) -> np.ndarray:
    model = load_model(path, n_ctx=64, logits_all=True)
    try:
        model.eval(IDS)
        return np.array(model.scores[: len(IDS)])
    finally:
        model.close()


def true_logits(source: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


def test_a_file_that_is_not_loaded_fails_with_llama_cpps_own_words(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(AssertionError, match="m.gguf\n.*invalid magic characters: 'GGUX'"):
        load_model(file)


@pytest.mark.parametrize("model", [*MODELS, "demo"])
def test_llama_cpp_computes_the_logits_of_transformers(
    model: str, sources: Any, weightmill: Any, tmp_path: Path
) -> None:
    file = made(weightmill, sources(model), tmp_path / "out", "quant=none", "quant.dtype=float32", "output=gguf")
    theirs, ours = true_logits(sources(model)), logits(file)
    # both in float32, summed in other orders; llama.cpp keeps keys and values as float16
    assert np.abs(ours - theirs).max() < 2e-2 * np.abs(theirs).max()
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.85


@pytest.mark.parametrize("model", ["llama untied", "llama tied", "llama odd", "qwen3 moe"])
def test_llama_cpp_runs_bitnets_rounding(model: str, sources: Any, weightmill: Any, tmp_path: Path) -> None:
    file = made(weightmill, sources(model), tmp_path / "out", "quant=ternary_aggressive")
    ran = weightmill(
        "run",
        f"model.path={tmp_path / 'out'}",
        f"output.path={tmp_path / 'plain'}",
        "quant=none",
        "quant.dtype=float32",
    )
    assert ran.status == 0, ran.err
    theirs, ours = true_logits(tmp_path / "plain"), logits(file)
    # llama.cpp rounds activations to eight bits where weights are ternary
    assert np.corrcoef(theirs.reshape(-1), ours.reshape(-1))[0, 1] > 0.99


SMALL = ("Q2_K", "Q3_K_S", "Q3_K_L", "Q4_K_S", "Q5_K_S", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS")
CASES = [
    *(("llama untied", t) for t in ("Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "TQ2_0", "F16", "BF16", "Q2_K",
                                    "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q5_K_S", "TQ1_0", "Q4_1", "Q5_0", "Q5_1",
                                    "Q3_K_S", "IQ4_NL", "IQ4_XS")),
    *(("llama odd", t) for t in ("Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K", "TQ2_0", "Q3_K_M", "Q4_0", "F16", "BF16",
                                 *SMALL)),
    *(("mixtral", t) for t in ("Q4_K_M", "Q5_K_M", "Q3_K_M", "Q2_K", "Q8_0", "Q5_K_S", "Q3_K_L", "Q5_0",
                               "IQ4_XS")),
    *(("qwen3 moe", t) for t in ("Q4_K_M", "Q6_K", "MXFP4_MOE", "Q4_0", "TQ2_0", "F16", "BF16", "Q4_K_S", "Q3_K_S",
                                 "Q5_1", "Q4_1", "IQ4_NL")),
    *((m, "Q4_K_M") for m in ("llama tied", "llama 3 rope", "qwen2 tied", "qwen3", "mistral", "demo")),
    *(("llama tied", t) for t in ("TQ2_0", "Q4_0", "Q5_K_M", "Q6_K", "F16", "BF16", "Q3_K_M", *SMALL)),
    ("qwen2 tied", "Q8_0"), ("demo", "Q8_0"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "file_type"), CASES)
def test_a_model_is_quantized_as_llama_cpp_quantizes_it(
    model: str, file_type: str, sources: Any, weightmill: Any, tmp_path: Path
) -> None:
    source = sources(model)
    base = made(weightmill, source, tmp_path / "base", "quant=gguf_bf16")
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(base, theirs, file_type)
    ours = made(weightmill, source, tmp_path / "out", "quant=gguf_q8_0", f"quant.file_type={file_type}")
    one, other = tensors_of(ours), tensors_of(theirs)
    assert {n: t[:2] for n, t in one.items()} == {n: t[:2] for n, t in other.items()}
    assert [name for name in one if one[name] != other[name]] == []
    assert metadata_of(ours) == metadata_of(theirs)
    if file_type in RUN:
        assert np.array_equal(logits(ours), logits(theirs))
    # and from the GGUF, as it does
    again = made(weightmill, base.parent, tmp_path / "again", "quant=gguf_q8_0", f"quant.file_type={file_type}")
    assert tensors_of(again) == one
    assert metadata_of(again) == metadata_of(theirs)
    ran = weightmill("verify", f"output.path={tmp_path / 'out'}")
    assert ran.status == 0, ran.err


@pytest.mark.parametrize("file_type", ["Q4_0", "Q4_K_M"])
def test_a_pure_mix_is_llama_cpps(file_type: str, sources: Any, weightmill: Any, tmp_path: Path) -> None:
    base = made(weightmill, sources("llama untied"), tmp_path / "base", "quant=gguf_bf16")
    llama_quantize(base, tmp_path / "theirs.gguf", file_type, pure=True)
    ours = made(weightmill, base.parent, tmp_path / "out", "quant=gguf_q8_0", f"quant.file_type={file_type}",
                "quant.pure=true")  # fmt: skip
    assert tensors_of(ours) == tensors_of(tmp_path / "theirs.gguf")


REQUANTIZED = [
    ("llama untied", "Q8_0", "Q4_K_M"), ("llama untied", "Q4_K_M", "Q8_0"), ("llama untied", "Q6_K", "Q4_0"),
    ("llama tied", "Q4_0", "Q5_K_M"), ("mixtral", "Q8_0", "Q4_K_M"), ("llama odd", "Q8_0", "Q4_K_M"),
    ("llama untied", "Q8_0", "F16"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "before", "after"), REQUANTIZED)
def test_what_is_quantized_already_is_quantized_again_as_llama_cpp_does(
    model: str, before: str, after: str, sources: Any, weightmill: Any, tmp_path: Path
) -> None:
    base = made(weightmill, sources(model), tmp_path / "base", "quant=gguf_q8_0", f"quant.file_type={before}")
    llama_quantize(base, tmp_path / "theirs.gguf", after, again=True)
    ours = made(weightmill, base.parent, tmp_path / "out", "quant=gguf_q8_0", f"quant.file_type={after}")
    assert tensors_of(ours) == tensors_of(tmp_path / "theirs.gguf")
    assert metadata_of(ours) == metadata_of(tmp_path / "theirs.gguf")
    assert list(tensors_of(ours)) == list(tensors_of(base))
    ran = weightmill("verify", f"output.path={tmp_path / 'out'}")
    assert ran.status == 0, ran.err


def test_a_split_model_loads_and_is_read(sources: Any, weightmill: Any, tmp_path: Path) -> None:
    source = sources("qwen3 moe")
    whole = made(weightmill, source, tmp_path / "whole", "quant=gguf_q8_0")
    first = made(weightmill, source, tmp_path / "split", "quant=gguf_q8_0", "output.split=true")
    assert len(list((tmp_path / "split").glob("*-of-*.gguf"))) > 2
    assert np.array_equal(logits(first), logits(whole))
    joined = made(weightmill, tmp_path / "split", tmp_path / "joined", "quant=none", "output=gguf")
    assert tensors_of(joined) == tensors_of(whole)


@pytest.mark.parametrize("model", ["llama untied", "mixtral", "qwen3 moe", "qwen2 tied"])
def test_a_gguf_comes_back_as_a_checkpoint_of_transformers(
    model: str, sources: Any, weightmill: Any, tmp_path: Path
) -> None:
    source = sources(model)
    made(weightmill, source, tmp_path / "gguf", "quant=gguf_bf16")
    ran = weightmill("run", f"model.path={tmp_path / 'gguf'}", f"output.path={tmp_path / 'back'}", "quant=none",
                     "quant.dtype=bfloat16")  # fmt: skip
    assert ran.status == 0, ran.err
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = loaded(input_ids=torch.tensor([IDS])).logits[0].numpy()
    assert np.array_equal(found, true_logits(source))


def test_words_are_cut_as_transformers_cuts_them(weightmill: Any, tmp_path: Path) -> None:
    file = made(weightmill, DEMO, tmp_path / "out", "quant=gguf_q8_0")
    model = load_model(file, vocab_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    for text in ("The file's 12345 bytes  are\n\nread, aren't they?", " Grüße, 世界! <|eos|>", "a"):
        assert model.tokenize(text.encode(), special=True) == tokenizer(text).input_ids
    model.close()
