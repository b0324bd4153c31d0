"""Checks of what diffusers reads through bitsandbytes: the skip list of a component against what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loaders.architectures.diffusers import is_skipped
from loaders.lint.base import Finding, Subject, fault, module, some
from loaders.lint.transformers import SKIP_KEYS, bitsandbytes
from loaders.words import counted

METHOD = "bitsandbytes"


def check(subject: Subject) -> Iterator[Finding]:
    """Yield the problems that diffusers would have with a component that bitsandbytes quantized."""
    block: Mapping[str, Any] = subject.config["quantization_config"]
    key = SKIP_KEYS[METHOD]
    skip = block.get(key) or []
    if not (isinstance(skip, list) and all(isinstance(name, str) for name in skip)):
        yield fault("diffusers", f"{key} is no list of names", "fails", "write a list, or null")
        return
    layers = [tensor for tensor in subject.sources.tensors if tensor.role == "linear" and len(tensor.shape) == 2]
    bare = [module(tensor) for tensor in layers if tensor.decode is None and not is_skipped(module(tensor), skip)]
    if bare:
        yield fault(
            "diffusers",
            f"{counted(len(bare), 'linear layer is', 'linear layers are')} stored plain and not in {key}: {some(bare)}",
            "makes quantized modules of them and finds no codes",
            f"name them in {key}",
        )
    quantized = [tensor for tensor in subject.sources.tensors if tensor.decode is not None]
    caught = [module(tensor) for tensor in quantized if is_skipped(module(tensor), skip)]
    if caught:
        yield fault(
            "diffusers",
            f"{counted(len(caught), 'quantized layer is', 'quantized layers are')} skipped by {key}: {some(caught)}",
            "makes plain modules of them and fails on the shapes",
            f"take them out of {key}",
        )
    kept = [module(tensor) for tensor in quantized if tensor.role == "sensitive"]
    if kept:
        yield fault(
            "diffusers",
            f"{counted(len(kept), 'layer')} that the class keeps in float32 {'is' if len(kept) == 1 else 'are'}"
            f" quantized: {some(kept)}",
            "makes plain modules of them and fails on the shapes",
            "keep them by a rule",
        )
    yield from bitsandbytes(subject)


BY_METHOD: Mapping[str, Callable[[Subject], Iterator[Finding]]] = {METHOD: check}
