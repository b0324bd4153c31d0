"""DeepSeek V4's and Kimi K2.5's ways of storing, on tiny models of their names: found, decoded, and quantized anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import ThreadedWork
from tests.loaders.tensors.quantized import bf16, e4m3_values_once, fp8_tensors
from tests.making import Raw, read_safetensors, values_of, weights, write_checkpoint
from tests.reading import tensors_in, values

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
Made = tuple[dict[str, Raw], dict[str, np.ndarray], dict[str, Any]]


def deepseek_v4() -> Made:
    """float8 by blocks with scales that are powers of two, and experts of two float4 codes a byte."""
    rng, parts, wanted = np.random.default_rng(0), {}, {}
    for name in ("layers.0.attn.wq_a", "layers.0.ffn.shared_experts.w1"):
        codes, _ = fp8_tensors((256, 128), (128, 128))
        powers = rng.integers(118, 125, (2, 1), dtype=np.uint8)
        parts |= {f"{name}.weight": Raw("F8_E4M3", codes), f"{name}.scale": Raw("F8_E8M0", powers)}
        wanted[f"{name}.weight"] = e4m3_values_once[codes] * np.repeat(np.exp2(powers - 127.0), 128, axis=0)
    for expert in range(2):
        name = f"layers.0.ffn.experts.{expert}.w1"
        packed, powers = rng.integers(0, 256, (64, 64), np.uint8), rng.integers(118, 125, (64, 4), dtype=np.uint8)
        parts |= {f"{name}.weight": Raw("I8", packed.view(np.int8)), f"{name}.scale": Raw("F8_E8M0", powers)}
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(64, 128)
        wanted[f"{name}.weight"] = E2M1[codes] * np.repeat(np.exp2(powers - 127.0), 32, axis=1)
    parts["embed.weight"] = weights(rng.standard_normal((96, 128)).astype(np.float32), "BF16")
    block = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    return parts, wanted, {"model_type": "deepseek_v4", "quantization_config": block}


def kimi_k25() -> Made:
    """Experts of compressed-tensors' four bits in groups of 32, said in the text model's config."""
    rng, parts, wanted = np.random.default_rng(0), {}, {}
    for expert in range(2):
        name = f"language_model.model.layers.1.mlp.experts.{expert}.up_proj"
        codes = rng.integers(-8, 8, (64, 128))
        scales = weights((rng.random((64, 4)) * 0.01).astype(np.float32), "BF16")
        words = ((codes + 8).reshape(64, 16, 8) << np.arange(0, 32, 4)).sum(axis=2).astype(np.uint32).view(np.int32)
        parts |= {
            f"{name}.weight_packed": Raw("I32", words),
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": Raw("I64", np.array([64, 128])),
        }
        wanted[f"{name}.weight"] = codes * np.repeat(values_of(scales), 32, axis=1)
    name = "language_model.model.layers.1.self_attn.o_proj.weight"
    parts[name] = weights(rng.standard_normal((64, 128)).astype(np.float32), "BF16")
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    block = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}},
        "ignore": ["lm_head", "re:.*self_attn.*"],
    }  # fmt: skip
    return (
        parts,
        wanted,
        {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2", "quantization_config": block}},
    )


@pytest.mark.parametrize("made", [deepseek_v4, kimi_k25])
def test_they_are_decoded_and_quantized_anew(made: Any, tmp_path: Path, work: ThreadedWork, weightmill: Any) -> None:
    parts, wanted, config = made()
    root = write_checkpoint(tmp_path / "source", parts, config={"dtype": "bfloat16", **config}, shards=2)
    found = tensors_in(root)
    assert not any("scale" in name or "packed" in name for name in found)
    inspected = weightmill("inspect", f"model.path={root}", "format=json").document
    planned = weightmill("plan", f"model.path={root}", "quant=w4a16", "format=json").document
    assert inspected["parameters"] == planned["source"]["parameters"]
    for name, array in wanted.items():
        assert np.array_equal(values(root, found[name], work), bf16(array.astype(np.float32))), name
    given = f"model.path={root}", f"output.path={tmp_path / 'out'}", "lint=warn"
    for quant in (("quant=none", "quant.dtype=bfloat16"), ("quant=w4a16", "output.overwrite=true")):
        ran = weightmill("run", *given, *quant)
        assert ran.status == 0, ran.err
        if quant[0] == "quant=none":
            plain = read_safetensors(tmp_path / "out")
            assert all(np.array_equal(values_of(plain[n]), bf16(a.astype(np.float32))) for n, a in wanted.items())
