"""An engine's own tool as a command, which makes of a checkpoint what a preset of ours does: see peers.py.

    python -P jobs/benchmarks/job/peer_tools.py TOOL SOURCE OUTPUT SETTING

It is started by its path, in any environment that has the tool, so it imports nothing of this package; with -P, the
files beside it are no modules. It prints a JSON object: `import_s`, the seconds until the tool was imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()
KEPT = ("embed_tokens", "lm_head", "norm")  # parts of the names of weights that HQQ does not quantize


def llmcompressor(source: str, output: str, setting: str) -> float:
    """llm-compressor's `model_free_ptq`, which works on files, as our jobs do; the setting: scheme, workers."""
    from llmcompressor import model_free_ptq

    imported = time.perf_counter()
    scheme, workers = setting.split()
    model_free_ptq(
        source, output, scheme=scheme, ignore=["lm_head", "model.embed_tokens"], device="cpu",
        max_workers=int(workers) or cores(),
    )  # fmt: skip
    return imported


def mlx(source: str, output: str, setting: str) -> float:
    """mlx-lm's `convert`, affine in groups of 64; the setting is the number of bits."""
    from mlx_lm import convert

    imported = time.perf_counter()
    convert(source, mlx_path=output, quantize=True, q_group_size=64, q_bits=int(setting))
    return imported


def llama_quantize(source: str, output: str, setting: str) -> float:
    """llama.cpp's llama-quantize, of a GGUF that `source` holds; the setting is the name of a file type."""
    import ctypes

    import llama_cpp

    imported = time.perf_counter()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = cores()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{setting}")
    [gguf] = sorted(Path(source).rglob("*.gguf"))
    Path(output).mkdir()
    made = str(Path(output) / "model.gguf")
    status = llama_cpp.llama_model_quantize(str(gguf).encode(), made.encode(), ctypes.byref(params))
    if status:
        raise SystemExit(f"llama_model_quantize: {status}")
    return imported


def hqq(source: str, output: str, setting: str) -> float:
    """The quantizer of hqq, a weight after the other, groups of 64 along axis 1; the setting is the number of bits."""
    import torch
    from hqq.core.quantize import Quantizer
    from safetensors import safe_open

    imported = time.perf_counter()
    found = {}
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                weight = opened.get_tensor(name)
                if weight.dim() != 2 or any(part in name for part in KEPT):
                    found[name] = weight
                    continue
                codes, meta = Quantizer.quantize(
                    weight, nbits=int(setting), group_size=64, axis=1, optimize=True, device="cpu",
                    compute_dtype=torch.bfloat16,
                )  # fmt: skip
                found[name] = {"W_q": codes, **meta}
    Path(output).mkdir()
    torch.save(found, Path(output) / "qmodel.pt")
    return imported


def cores() -> int:
    """Return the number of cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sync(output: str) -> None:
    """Sync what the tool wrote, as our jobs sync theirs."""
    for path in Path(output).rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


TOOLS = {"llmcompressor": llmcompressor, "mlx": mlx, "llama_quantize": llama_quantize, "hqq": hqq}

if __name__ == "__main__":
    tool, source, output, setting = sys.argv[1:]
    imported = TOOLS[tool](source, output, setting)
    sync(output)
    print()
    print(json.dumps({"import_s": imported - BEGAN}))
