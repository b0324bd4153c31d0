"""Functions of tensors whose operations a GPU makes in a few kernels, rather than one kernel each.

A search goes over the same weights dozens of times, by dozens of operations each. One by one, every operation reads and
writes the GPU's memory, and is launched from Python; fused by torch.compile, the weights are read once a step. torch
fuses by Triton, which its wheels for CUDA on Linux bring along; without it operations run one by one.

Fused kernels may contract a product and a sum into one rounding, so only searches are fused, which may find other codes
than the CPU's. The encoders of one rounding are not: their bytes are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """Compile a function, whose first argument is a tensor, at its first call on a GPU."""

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True)

    @wraps(function)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        call = compiled() if first.is_cuda and _has_triton() else function
        return call(first, *rest)

    return cast("Function", run)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
