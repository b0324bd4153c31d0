"""`weightmill bench load`: loading weights into tensors and models, compared with safetensors and transformers.

Every loaded byte is summed, so that a memory map is not credited for bytes that it did not read. The time runs from the
files in the page cache to weights whose every byte was read; importing libraries is not part of it.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.benchmarks.busy_machine import Busy
from jobs.benchmarks.random_llama import given_or_random
from jobs.benchmarks.summing import Summing
from jobs.benchmarks.table import cases_said
from jobs.benchmarks.timing import Case, rotate
from jobs.cli.verb import Said, note
from loaders.backends.machine import usable_cpus
from loaders.backends.memory import PeakMemory
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.loading.load import load_weights

# Seconds after which a case is timed no further. On CPUs transformers with bitsandbytes takes up to half a minute a
# gigabyte, and seven laps of that would take longer than all else.
LIMIT_S = 30.0
PLAIN, MODEL = "load_weights", "load_model_and_tokenizer"
ENGINES = {"nf4": "nf4", "fp4": "fp4"}  # presets to which transformers quantizes while loading -> bitsandbytes' name


def time_load(path: str | None, gb: float, quant: str, folder: str | None, repeats: int) -> Said:
    """Time loading weights into tensors and models from the page cache, next to safetensors and transformers.

    Raises:
        BadSpec: the folder holds no weights.
    """
    with given_or_random(path, gb, folder) as (_, source), ThreadPoolExecutor(usable_cpus()) as pool:
        checkpoint, busy = open_checkpoint(source), Busy()
        made = list(cases(source, quant, pool))
        note(f"timing {len(made)} cases, {repeats} laps each, after one that does not count")
        rotate(made, repeats, shuffled=True, limit_s=LIMIT_S)
        about = {"source": str(source), "bytes": checkpoint.size, "repeats": repeats, "quant": quant}
        return cases_said(made, checkpoint.size, busy, about)


class Loaded:
    """A case that loads weights, sums them and frees them; `peak_bytes` is its peak of anonymous memory."""

    def __init__(self, load: Callable[[], Iterable[Any]], pool: ThreadPoolExecutor) -> None:
        self.peak_bytes = 0
        self._load = load
        self._pool = pool

    def __call__(self) -> float:
        """Load once; returns the seconds it took."""
        # Models have reference cycles, and garbage of the last case must not be collected in this one.
        gc.collect()
        with PeakMemory() as memory:
            began = time.perf_counter()
            summing, kept = Summing(self._pool, usable_cpus()), self._load()
            for tensor in kept:
                summing.add(_raw(tensor))
            summing.total()
            took = time.perf_counter() - began
        self.peak_bytes = max(self.peak_bytes, memory.peak_bytes)
        return took


def _raw(tensor: Any) -> Any:
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def cases(folder: Path, quant: str, pool: ThreadPoolExecutor) -> Iterator[Case]:
    """Yield our cases, each with its peer. Cases whose libraries are not installed are rows that say so."""
    missing = _missing("transformers") or _missing("accelerate")
    engine = missing or (_missing("bitsandbytes") if quant in ENGINES else f"transformers does not quantize to {quant}")

    def case(name: str, load: Callable[[], Iterable[Any]], lacking: str = "", beside: str = "") -> Case:
        return Case(name, None if lacking else Loaded(load, pool), lacking, beside)

    yield case(PLAIN, lambda: _parts(load_weights(folder)[0]))
    no_files = _none_of(folder)
    yield case("safetensors.torch.load_file", lambda: _by_safetensors(folder), no_files, PLAIN)
    yield case("fastsafetensors", lambda: _by_fastsafetensors(folder), no_files or _missing("fastsafetensors"), PLAIN)
    yield case("Run:ai streamer", lambda: _by_runai(folder), no_files or _missing("runai_model_streamer"), PLAIN)
    yield case("InstantTensor", list, _missing("instanttensor") or "it loads onto GPUs only, this is the CPU", PLAIN)
    yield case(f"{PLAIN}, {quant}", lambda: _parts(load_weights(folder, quantize=quant, measure=False)[0]))
    yield case(f"{PLAIN}, {quant}, measured", lambda: _parts(load_weights(folder, quantize=quant)[0]))
    yield case(MODEL, lambda: _ours(folder), missing)
    yield case("transformers, from_pretrained", lambda: _theirs(folder), missing, MODEL)
    yield case(f"{MODEL}, {quant}", lambda: _ours(folder, quantize=quant), engine)
    yield case(f"transformers, from_pretrained, {quant}", lambda: _theirs(folder, quant), engine, f"{MODEL}, {quant}")


def _missing(name: str) -> str:
    try:
        importlib.import_module(name)
    except ImportError:
        return f"not installed: {name}"
    return ""


def _none_of(folder: Path) -> str:
    return "" if any(folder.glob("*.safetensors")) else "the checkpoint is not in safetensors"


def _by_safetensors(folder: Path) -> list[Any]:
    from safetensors.torch import load_file

    return [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in load_file(path).values()]


def _by_fastsafetensors(folder: Path) -> list[Any]:
    from fastsafetensors import SafeTensorsFileLoader

    found: list[Any] = []
    for path in sorted(folder.glob("*.safetensors")):
        files = SafeTensorsFileLoader(None, "cpu", nogds=True, set_numa=False)
        files.add_filenames({0: [str(path)]})
        buffer = files.copy_files_to_device()
        # Tensors lie in the library's buffer of the file, and go with it.
        found += [buffer.get_tensor(name).clone() for name in files.get_keys()]
        buffer.close()
        files.close()
    return found


def _by_runai(folder: Path) -> list[Any]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in sorted(folder.glob("*.safetensors"))])
        return [tensor for _, tensor in streamer.get_tensors()]


def _parts(weights: dict[str, Any]) -> list[Any]:
    """Return all tensors. A generator would free the weights at its end, and so within the time of the case."""
    return [
        part
        for weight in weights.values()
        for part in (weight.tensors().values() if hasattr(weight, "tensors") else (weight,))
    ]


def _ours(folder: Path, **settings: Any) -> list[Any]:
    from loaders.models import load_model_and_tokenizer

    model, _ = load_model_and_tokenizer(folder, "cpu", **settings)
    return _weights_of(model)


def _theirs(folder: Path, quant: str = "") -> list[Any]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from loaders.models.foreign import model_from

    options: dict[str, Any] = {}
    if quant:
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type=ENGINES[quant], bnb_4bit_compute_dtype=torch.bfloat16
        )
    auto: Any = AutoModelForCausalLM
    return _weights_of(model_from(auto, folder, dtype="auto", device_map={"": "cpu"}, **options))


def _weights_of(model: Any) -> list[Any]:
    """Return the tensors of a model, each once."""
    return [parameter.data for parameter in model.parameters()]
