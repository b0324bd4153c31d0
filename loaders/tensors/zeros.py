"""Zeros: the decoder of a tensor of zeros that is stored nowhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loaders.quantization.scheme import Stored, Work
from loaders.specs import TensorSpec


@dataclass(frozen=True, slots=True)
class Zeros:
    """A decoder that needs nothing stored and gives zeros; see `Decoder`."""

    kind: ClassVar[str] = "zeros"

    def align(self, spec: TensorSpec) -> int:
        return 1

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        out[:] = 0
