"""Inputs of the reader of importance matrices: damaged files of both forms."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from loaders.imatrix.read import open_matrix
from tests import imatrices
from tests.fuzz.cases import Case, Reader
from tests.fuzz.mutations import Draw, damaged

SUMS = {
    "blk.0.attn_q.weight": (np.full((1, 64), 2, np.float32), np.array([3], np.float32)),
    "blk.0.ffn_up_exps.weight": (np.full((4, 32), 5, np.float32), np.array([7, 0, 2, 1], np.float32)),
}


@cache
def forms() -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        return tuple(write(path, SUMS).read_bytes() for write in (imatrices.write_gguf, imatrices.write_dat))  # type: ignore[return-value]


@st.composite
def imatrix_cases(draw: Draw) -> Case:
    raw = draw(st.sampled_from(forms()))
    return Case(files={"m": draw(damaged(raw, draw(st.sampled_from((24, 100, 700)))))})


def read(folder: Path, words: tuple[str, ...]) -> None:
    """Open a matrix, and read all that it says that it has."""
    matrix = open_matrix(folder / "m")
    for name, sums in matrix.sums.items():
        columns = sums.numbers // len(sums.counts)
        assert np.isfinite(matrix.of(name, columns, len(sums.counts)).read()).all()


READERS = {"imatrix": Reader(imatrix_cases(), read)}
