"""Already quantized checkpoints, held against the dequantization of the tools that read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loaders.backends.threads import ThreadedWork
from tests.making import LLAMA
from tests.reading import tensors_in, values

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.engine

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def save(root: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    import json

    from safetensors.torch import save_file

    root.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps({**LLAMA, "dtype": "float32", **config}))
    return root


@pytest.mark.parametrize("scale_dtype", ["float32", "float8_e8m0fnu"])
def test_fp8_is_what_transformers_dequantizes(scale_dtype: str, tmp_path: Path, work: ThreadedWork) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(256, 384, generator=generator) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=generator).to(getattr(torch, scale_dtype))
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    root = save(
        tmp_path / "m", {Q_PROJ: weight, Q_PROJ + "_scale_inv": scale},
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )  # fmt: skip
    assert torch.equal(torch.from_numpy(values(root, tensors_in(root)[Q_PROJ], work)), wanted)
