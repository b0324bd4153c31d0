"""BitNet's rounding in ggml's blocks, and how small its forms make a model of 1.3 billion parameters."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.quantization.schemes.bitnet import Ternary
from loaders.quantization.schemes.ggml import Ggml
from tests.encoding import DTYPE_NAMES, decode, encode, random
from tests.making import tokenizer, values_of, weights

# --- ternary


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(4, 1), (8, 5), (64, 96), (12, 1000)])
@pytest.mark.usefixtures("small_ranges")
def test_ternary_is_the_arithmetic_written_out(shape: tuple[int, int], dtype: str, work: ThreadedWork) -> None:
    raw = random(shape, dtype, seed=2)
    values = values_of(raw)
    mean = max(np.float32(np.abs(values.astype(np.float64)).mean()), np.float32(1e-5))
    codes = (np.clip(np.rint(values * (np.float32(1) / mean)), -1, 1) + 1).astype(np.uint8)
    quarters = codes.reshape(4, -1)
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    for scheme, scale in ((Ternary(), np.float32(1) / mean), (Ternary("autobitlinear"), mean)):
        sink, _ = encode(scheme, raw, work)
        assert np.array_equal(sink.stored["weight"], packed)
        assert np.array_equal(sink.stored["weight_scale"], weights(np.array([scale]), dtype).data)


HIDDEN, MLP, LAYERS, VOCABULARY = 2048, 5632, 24, 32000  # a BitNet of 1.3 billion parameters


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_blocks_hold_what_bitnet_rounds_to(kind: str, dtype: str) -> None:
    raw = weights(np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32), dtype)
    scheme = Ggml(kind, absmean=True)
    with Crew(1) as crew:
        work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
        sink, error = encode(scheme, raw, work)
        found = decode(scheme, raw, sink, work)
    values = values_of(raw)
    mean = np.float32(np.abs(values.astype(np.float64)).mean())
    expected = np.clip(np.rint(values * (1 / mean)), -1, 1) * np.float32(np.float16(mean))
    assert np.array_equal(found, expected)
    assert 0.3 < error.relative_error < scheme.error_limit


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of its shape; on the disk mostly a hole."""
    folder = tmp_path_factory.mktemp("bitnet")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": HIDDEN,
        "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(VOCABULARY)))
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        shapes |= {name + f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes |= {name + f"mlp.{part}_proj": (MLP, HIDDEN) for part in ("gate", "up")}
        shapes |= {name + "mlp.down_proj": (HIDDEN, MLP)}
        shapes |= {name + norm: (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name + ".weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


@pytest.mark.parametrize(("quant", "ratio"), [("ternary", 4), ("ternary_aggressive", 6.2)])
def test_a_model_gets_as_small_as_published(quant: str, ratio: float, large: Path, weightmill: Any) -> None:
    ran = weightmill("plan", f"model.path={large}", f"quant={quant}", "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["output"]["ratio"] >= ratio
