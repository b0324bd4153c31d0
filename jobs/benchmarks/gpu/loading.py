"""Part `loading` of `weightmill bench gpu`: weights onto the device by each strategy, and by safetensors itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from jobs.benchmarks.gpu.trials import Bench, Found, Trial, finish, median_s, rate
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec
from loaders.strategies import LOADERS

QUANT = "nf4"


def trials(bench: Bench) -> Iterator[Trial]:
    """Yield a trial for each strategy. Files are in the page cache, and weights are compared with safetensors'."""
    wanted: dict[str, Any] = {}

    def theirs() -> Found:
        wanted.update(_by_safetensors(bench))
        return _timed(bench, partial(_by_safetensors, bench))

    yield Trial("safetensors' load_file", theirs)
    for name in LOADERS:
        yield Trial(f"strategy={name}", partial(_by_strategy, bench, name, wanted))
    wanted.clear()
    for backend in dict.fromkeys(("cpu", bench.device)):
        yield Trial(f"quantize={QUANT}, backend={backend}", partial(_quantized, bench, backend))


def _by_safetensors(bench: Bench) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(bench.source.glob("*.safetensors")):
        found |= load_file(path, device=bench.device)
    return found


def _timed(bench: Bench, load: Callable[[], object]) -> Found:
    """Time a load without a warm-up lap: each case has loaded once before, or takes so long that it does not matter."""
    wait = finish(bench.device)

    def call() -> None:
        held = load()
        wait()
        del held

    return rate(median_s(call, bench.laps, warm_up=0), open_checkpoint(bench.source).size)


def _by_strategy(bench: Bench, name: str, wanted: dict[str, Any]) -> Found:
    """Load by one strategy. One that is not for this device, or whose library is missing, is a row without a fault."""
    import torch

    from loaders.loading.load import load_weights

    def load() -> dict[str, Any]:
        return load_weights(bench.source, device=bench.device, strategy=name)[0]

    try:
        held = load()
    except BadSpec as error:
        return Found(said=f"refused: {error}")
    # Comparing comes before timing, and frees the weights, so that the device holds only one copy at a time.
    elsewhere = [key for key, weight in held.items() if weight.device.type != bench.device.partition(":")[0]]
    wrong = [key for key, weight in wanted.items() if not torch.equal(held[key], weight)]
    del held
    found = _timed(bench, load)
    if elsewhere or wrong:
        key = (elsewhere or wrong)[0]
        return Found(found.numbers, fault=f"{len(elsewhere)} weights elsewhere, {len(wrong)} wrong, such as {key}")
    return Found(found.numbers, f"all {len(wanted)} weights right" if wanted else "not compared: load_file failed")


def _quantized(bench: Bench, backend: str) -> Found:
    from loaders.loading.load import load_weights

    def load() -> object:
        return load_weights(bench.source, device=bench.device, quantize=QUANT, backend=backend)

    return _timed(bench, load)
