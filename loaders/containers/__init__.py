"""How bytes sit in files: headers and offsets. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from loaders.containers import gguf, pytorch, safetensors
from loaders.containers.writing import MakeHead, ShardWriter
from loaders.specs import OutputFile, StoredTensor, WeightSpec

READERS: dict[str, Callable[[Path, str], tuple[WeightSpec, ...]]] = {
    "safetensors": safetensors.read_specs,
    "pytorch": pytorch.read_specs,
    "gguf": gguf.read_specs,
}
# A file of a container from its name and tensors, and what makes its first bytes once its tensors are there
LAY_OUT: dict[str, Callable[[str, Iterable[StoredTensor]], OutputFile]] = {
    "safetensors": safetensors.lay_out,
    "gguf": gguf.lay_out,
}
HEADS: dict[str, MakeHead] = {
    "safetensors": safetensors.head,
    "gguf": lambda file, tensors: b"",  # a piece; whole files have their head from the plan
}


def writer(path: Path, file: OutputFile) -> ShardWriter:
    """What writes a planned file to `path`."""
    return ShardWriter(path, file, HEADS[file.container])
