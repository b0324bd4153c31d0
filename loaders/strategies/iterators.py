"""Iterators over weights as functions, called as vLLM's are: a list of files in, (name, tensor) out.

A program written for `vllm.model_executor.model_loader.weight_utils` runs with its import changed. The same signatures,
and these differences: tensors come in the order of the files that are given; files are one source, so that a tensor in
two of them is refused; safetensors and PyTorch files are read by each function that can. Tensors are torch's, on the
CPU unless a function says where else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.file_lists import Given, open_weights
from loaders.containers.gguf import TYPE_IDS
from loaders.errors import BadSpec
from loaders.strategies.base import WeightLoader
from loaders.strategies.eager import EagerLoader
from loaders.strategies.fastsafetensors import FastSafetensorsLoader
from loaders.strategies.lazy import LazyLoader
from loaders.strategies.low_memory import rank_here
from loaders.strategies.multithread import MultiThreadWeightLoader
from loaders.strategies.runai import RunaiLoader

if TYPE_CHECKING:
    import torch

Weights = Iterator[tuple[str, "torch.Tensor"]]
EXPERT = re.compile(r"\.experts\.(\d+)\.")
PLAIN_GGML = ("F32", "F16", "BF16")  # types whose tensors vLLM takes under their own names


def safetensors_weights_iterator(
    hf_weights_files: Given,
    use_tqdm_on_load: bool = False,
    safetensors_load_strategy: str | None = "lazy",
    local_expert_ids: Collection[int] | None = None,
) -> Weights:
    """Yield (name, tensor) of weight files.

    hf_weights_files: a list of files, or whatever else `WeightLoader.iterate_weights` takes.
    use_tqdm_on_load: True shows a bar of the bytes on standard error; of several ranks, the first shows it.
    safetensors_load_strategy: "lazy" or None maps files; "eager" reads all into memory before the first tensor;
    "prefetch" has threads fetch ahead.
    local_expert_ids: of tensors of experts (`.experts.N.`), only these are read.

    Raises:
        BadSpec: no such strategy, a bar that is neither True nor False, or as `WeightLoader.iterate_weights`; before a
            weight is read.
    """
    ways: dict[str | None, type[WeightLoader]] = {
        None: LazyLoader, "lazy": LazyLoader, "eager": EagerLoader, "prefetch": MultiThreadWeightLoader,
    }  # fmt: skip
    if safetensors_load_strategy not in ways:
        raise BadSpec(
            f"safetensors_load_strategy: expected lazy, eager or prefetch, found {safetensors_load_strategy!r}"
        )
    made, checkpoint = ways[safetensors_load_strategy](), _opened(hf_weights_files)
    return _iterated(made, checkpoint, "cpu", use_tqdm_on_load, local_expert_ids)


def multi_thread_safetensors_weights_iterator(
    hf_weights_files: Given, use_tqdm_on_load: bool = False, max_workers: int = 4
) -> Weights:
    """Yield (name, tensor) of weight files that at most `max_workers` threads read ahead; the rest as
    `safetensors_weights_iterator`.
    """
    return _iterated(MultiThreadWeightLoader(max_workers), _opened(hf_weights_files), "cpu", use_tqdm_on_load)


def fastsafetensors_weights_iterator(hf_weights_files: Given, use_tqdm_on_load: bool = False) -> Weights:
    """Yield (name, tensor) of safetensors files on this process's GPU (torch's current one), by fastsafetensors; on the
    CPU where there is none. The rest as `safetensors_weights_iterator`.

    Raises:
        BadSpec: the library is not installed, or a file is no safetensors file.
    """
    return _iterated(FastSafetensorsLoader(), _opened(hf_weights_files), _own_gpu(), use_tqdm_on_load)


def runai_safetensors_weights_iterator(
    hf_weights_files: Given, use_tqdm_on_load: bool = False, is_distributed: bool = False
) -> Weights:
    """Yield (name, tensor) of weight files, by Run:ai's streamer; the rest as `safetensors_weights_iterator`.

    is_distributed: tensors come on this process's GPU, if there is one. Each rank reads all of them: Run:ai's own
    sharing of reads among ranks is not used.

    Raises:
        BadSpec: the library is not installed.
    """
    device = _own_gpu() if is_distributed else "cpu"
    return _iterated(RunaiLoader(), _opened(hf_weights_files), device, use_tqdm_on_load)


def pt_weights_iterator(
    hf_weights_files: Given, use_tqdm_on_load: bool = False, pt_load_map_location: Any = "cpu"
) -> Weights:
    """Yield (name, tensor) of PyTorch files, of which no code is run; the rest as `safetensors_weights_iterator`.

    pt_load_map_location: the device, by its name or as a torch.device, or a mapping whose values are one device, such
    as {"": "cuda"}.
    """
    device = _one_device(pt_load_map_location)
    return _iterated(LazyLoader(), _opened(hf_weights_files), device, use_tqdm_on_load)


def multi_thread_pt_weights_iterator(
    hf_weights_files: Given,
    use_tqdm_on_load: bool = False,
    pt_load_map_location: Any = "cpu",
    max_workers: int = 4,
) -> Weights:
    """Yield (name, tensor) of PyTorch files that at most `max_workers` threads read ahead; the rest as
    `pt_weights_iterator`.
    """
    device = _one_device(pt_load_map_location)
    return _iterated(MultiThreadWeightLoader(max_workers), _opened(hf_weights_files), device, use_tqdm_on_load)


def gguf_quant_weights_iterator(gguf_file: Given, gguf_to_hf_name_map: Mapping[str, str] | None = None) -> Weights:
    """Yield (name, tensor) of a GGUF as vLLM's GGUF layers take them: of a quantized tensor first its type, ggml's
    number as a scalar under NAME.qweight_type, then its blocks, uint8 (rows, bytes), under NAME.qweight.

    gguf_to_hf_name_map: the tensors that are wanted, and their names; None takes all under their own.
    """
    import torch

    checkpoint = open_weights(gguf_file)
    if checkpoint.container != "gguf":
        raise BadSpec(f"gguf_file: expected a GGUF, found {checkpoint.container} at {checkpoint.address}")
    specs = {spec.name: spec for spec in checkpoint.weights}
    chosen = {name: name for name in specs} if gguf_to_hf_name_map is None else gguf_to_hf_name_map

    def named() -> Weights:
        wanted = [name for name in specs if name in chosen]
        for name, tensor in LazyLoader().iterate_weights(checkpoint, "cpu", names=wanted):
            kind, given = specs[name].dtype.name, chosen[name]
            if kind not in PLAIN_GGML and kind in TYPE_IDS:
                yield given.replace("weight", "qweight_type"), torch.tensor(TYPE_IDS[kind])
                given = given.replace("weight", "qweight")
            yield given, tensor

    return named()


# --- the same for all


def _iterated(
    made: WeightLoader, checkpoint: Checkpoint, device: str, shows: bool, experts: Collection[int] | None = None
) -> Weights:
    # A device in its place would be taken for a yes.
    if not isinstance(shows, bool):
        raise BadSpec(
            f"use_tqdm_on_load: expected True or False, found {shows!r}; no device is given here: loader(...)"
            ".iterate_weights(files, device) takes one"
        )
    return _yielded(made, checkpoint, device, shows, experts)


def _yielded(
    made: WeightLoader, checkpoint: Checkpoint, device: str, shows: bool, experts: Collection[int] | None
) -> Weights:
    names = [spec.name for spec in checkpoint.weights if _is_local(spec.name, experts)]
    sizes = {spec.name: spec.size for spec in checkpoint.weights}
    with _bar(sum(sizes[name] for name in names)) if shows and rank_here() == 0 else nullcontext() as advance:
        for name, tensor in made.iterate_weights(checkpoint, device, names=names):
            yield name, tensor
            del tensor  # it makes room for the next
            if advance is not None:
                advance(sizes[name])


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes on standard error; what this gives is called with those that came."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("Loading weights", total=total)
        yield lambda size: bar.advance(task, size)


def _opened(where: Given) -> Checkpoint:
    """Open weights whose tensors have a model's names; those of a GGUF are llama.cpp's."""
    checkpoint = open_weights(where)
    if checkpoint.container == "gguf":
        raise BadSpec(
            f"hf_weights_files: expected safetensors or PyTorch files, found a GGUF at {checkpoint.address};"
            " gguf_quant_weights_iterator reads it"
        )
    return checkpoint


def _is_local(name: str, experts: Collection[int] | None) -> bool:
    found = EXPERT.search(name) if experts is not None else None
    return found is None or experts is None or int(found[1]) in experts


def _own_gpu() -> str:
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _one_device(location: Any) -> Any:
    """Return the device of a map location of torch.load."""
    devices: Iterable[Any] = location.values() if isinstance(location, Mapping) else (location,)
    found = {str(device) for device in devices}
    if len(found) != 1:
        raise BadSpec(f"pt_load_map_location: expected one device for all tensors, found {location!r}")
    return found.pop()
