"""Checks of packed checkpoints, as moeflux maps them: dtypes that it knows, bits and places of experts.

Spans, shapes, alignment and bits are checked when a packed checkpoint is opened; see containers/packed.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from loaders.architectures.mlx_config import settings_of
from loaders.containers.packed import EXPERTS
from loaders.errors import setting
from loaders.layouts.packed import READ
from loaders.lint.base import Finding, Subject, fault, some, warning
from loaders.words import counted

ENGINE = "moeflux"
BITS = (4, 8)  # the widths that moeflux is known to compute with


def check(subject: Subject) -> Iterator[Finding]:
    """Yield the problems that moeflux would have."""
    weights = subject.checkpoint.weights
    odd = [f"{spec.name} ({spec.dtype})" for spec in weights if spec.dtype.name not in READ]
    if odd:
        yield fault(
            ENGINE,
            f"{counted(len(odd), 'tensor is', 'tensors are')} not {', '.join(READ)}: {some(odd)}",
            "does not know their dtype",
            f"write them again with {setting('dtype')}=bfloat16, or quantize",
        )
    block = settings_of(subject.config)
    if block is None:
        yield warning(
            ENGINE,
            "nothing is quantized",
            "computes its matrices from MLX's words alone",
            f"use {setting('quantize')}=mlx_int4",
        )
    else:
        own = [block, *(each for each in block.values() if isinstance(each, dict))]
        others = sorted({each["bits"] for each in own} - set(BITS))
        if others:
            yield warning(
                ENGINE,
                f"some weights have {', '.join(map(str, others))} bits",
                "is known to read 4 and 8",
                "quantize them to 4 or 8 bits",
            )
    inside = [r.name for r in subject.sources.tensors if r.role == "expert" and not _is_apart(r.stored[0][1].file)]
    if inside:
        yield warning(
            ENGINE,
            f"{counted(len(inside), 'tensor of experts is', 'tensors of experts are')} not in {EXPERTS}/:"
            f" {some(inside)}",
            "looks for routed experts there",
            "write it again from a checkpoint whose model_type is known",
        )


def _is_apart(file: str) -> bool:
    return file.startswith(f"{EXPERTS}/")
