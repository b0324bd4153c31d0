"""Part `models` of `weightmill bench gpu`: how right and fast models are that each strategy loads there.

The reference is what transformers computes on the device: with the source's weights, or, for quantized modules, with
their decoded weights as plain matrices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

from jobs.benchmarks.gpu.trials import Bench, Found, Trial, finish, median_s
from loaders.backends.devices import torch_device
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.models import LoadingStrategy

TOKENS = 64
# The allowed error of logits as a share of their norm, by scheme. The matrices are the same, so the error comes from
# bfloat16 sums in another order; int8 also rounds activations to 1/127 of their largest.
LIMITS = {"": 0.02, "nf4": 0.05, "int8": 0.1, "hqq4": 0.05}
NEEDED = {"": (), "nf4": ("bitsandbytes",), "int8": ("bitsandbytes",), "hqq4": ("hqq",)}
CASES = [
    *((strategy, "") for strategy in LoadingStrategy),
    *((LoadingStrategy.FULL, quant) for quant in ("nf4", "int8", "hqq4")),
    (LoadingStrategy.LOW_MEMORY, "nf4"),
    (LoadingStrategy.UNIFIED_MEMORY, "nf4"),
    (LoadingStrategy.STREAMING, "nf4"),
]


def trials(bench: Bench) -> Iterator[Trial]:
    """Yield trials: transformers' own loading first, then each strategy, plain and quantized while loading."""
    for name in ("transformers", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed")
    wanted: dict[str, Any] = {}

    def theirs() -> Found:
        began = perf_counter()
        model = _by_transformers(bench.small, bench.device)
        return _found(bench, model, perf_counter() - began)

    def ours(strategy: LoadingStrategy, quant: str) -> Found:
        missing = [name for name in NEEDED[quant] if importlib.util.find_spec(name) is None]
        if missing:
            return Found(said=f"not installed: {', '.join(missing)}")
        if quant not in wanted:
            wanted[quant] = _logits(_reference(bench, quant), bench)
        from loaders.models import load_model_and_tokenizer

        _forget_peak(bench.device)
        began = perf_counter()
        model = load_model_and_tokenizer(bench.small, bench.device, strategy=strategy, quantize=quant or None)[0]
        finish(bench.device)()
        took = perf_counter() - began
        logits = _logits(model, bench)
        error = float((logits - wanted[quant]).norm() / wanted[quant].norm())
        found = _found(bench, model, took)
        numbers, said = {**found.numbers, "error": error}, f"error {error:.2g}, {found.said}"
        if not error <= LIMITS[quant]:
            return Found(numbers, said, f"its logits are off by more than {LIMITS[quant]:g} of their norm")
        return Found(numbers, said)

    # Making it prints a note, which would be lost once output is silenced.
    assert bench.small
    yield Trial("transformers' from_pretrained", partial(_quietly, theirs))
    for strategy, quant in CASES:
        name = f"{strategy}, {quant}" if quant else str(strategy)
        yield Trial(name, partial(_quietly, partial(ours, strategy, quant)))


def _quietly(call: Callable[[], Found]) -> Found:
    """Run a trial without the engines' progress bars and warnings."""
    from loaders.models.runners import quiet

    with quiet(), redirect_stderr(StringIO()):
        return call()


def _by_transformers(folder: Path, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from loaders.models.foreign import model_from

    auto: Any = AutoModelForCausalLM
    return model_from(auto, folder, dtype=torch.bfloat16).to(device).eval()


def _reference(bench: Bench, quant: str) -> Any:
    """Load transformers' model; with a scheme, its matrices are replaced by their decoded quantized weights."""
    from loaders.loading.load import load_weights
    from loaders.loading.quantized_tensor import QuantizedTensor

    model = _by_transformers(bench.small, bench.device)
    if quant:
        for name, weight in load_weights(bench.small, quantize=quant)[0].items():
            if isinstance(weight, QuantizedTensor):
                model.get_parameter(name).data.copy_(weight.dequantize("bfloat16"))
    return model


def _logits(model: Any, bench: Bench) -> Any:
    import torch

    ids = torch.arange(1, TOKENS + 1) % int(open_checkpoint(bench.small).config["vocab_size"])
    with torch.inference_mode():
        return model(ids[None].to(bench.device), use_cache=False).logits.float()


def _found(bench: Bench, model: Any, took: float) -> Found:
    """Time a forward of a few tokens, and return it with the time of loading."""
    wait = finish(bench.device)

    def forward() -> None:
        _logits(model, bench)
        wait()

    forward_s, peak = median_s(forward, bench.laps), _peak(bench.device)
    numbers = {"seconds": took, "gbps": open_checkpoint(bench.small).size / took / 1e9, "forward_s": forward_s}
    said = f"{TOKENS} tokens in {forward_s * 1e3:.1f} ms"
    if peak is None:
        return Found(numbers, said)
    return Found({**numbers, "peak_device_bytes": peak}, f"{said}, at most {peak / 1e6:.0f} MB on the device")


def _forget_peak(device: str) -> None:
    torch, target = torch_device(device)
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)


def _peak(device: str) -> int | None:
    torch, target = torch_device(device)
    return int(torch.cuda.max_memory_allocated(target)) if target.type == "cuda" else None
