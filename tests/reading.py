"""Reading a checkpoint's logical tensors and their values as a job reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loaders.backends.threads import ThreadedWork
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.storage.base import PinnedFiles
from loaders.storage.folder import Folder
from loaders.strategies import loader
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.sources import tensors_of
from loaders.tensors.views import view_of
from tests.making import Raw, values_of


def files_of(root: Path) -> PinnedFiles:
    return PinnedFiles(Folder(root))


def tensors_in(root: Path) -> dict[str, LogicalTensor]:
    return {r.name: r for r in tensors_of(open_checkpoint(root), decode=True).tensors}


def values(root: Path, tensor: LogicalTensor, work: ThreadedWork, step: int | None = None) -> np.ndarray:
    """Return a tensor's values as float32, read `step` weights at a time."""
    numel = tensor.spec.numel
    with loader("read").open(files_of(root), [spec for _, spec in tensor.stored]) as reader:
        view = view_of(tensor, reader, work)
        found = [np.array(view.read(at, min(at + (step or numel), numel))) for at in range(0, numel, step or numel)]
    return values_of(Raw(tensor.dtype.name, np.concatenate(found))).reshape(tensor.shape)
