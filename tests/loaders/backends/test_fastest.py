"""The choice of backend=auto, by devices that are fast, slow, wrong or broken."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends import devices, fastest, machine, threads
from loaders.errors import BadSpec
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitnet import Ternary
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.quantization.schemes.compressed_tensors_rowwise import RowScaled
from loaders.quantization.schemes.ggml import Ggml
from loaders.quantization.schemes.hqq import Hqq
from loaders.quantization.schemes.mlx_affine import MlxAffine
from loaders.quantization.schemes.plain import Plain

NF4 = Bnb4("nf4")
LARGE = 1 << 40


class Slow(CpuKernels):
    """Kernels that take a hundred times as long as the range of a test."""

    def encode_fourbit(
        self, x: np.ndarray, dtype: str, table: str, group: int, packed: np.ndarray, absmax: np.ndarray
    ) -> None:
        time.sleep(0.02)
        super().encode_fourbit(x, dtype, table, group, packed, absmax)


class Wrong(CpuKernels):
    """Kernels with one wrong code in each range."""

    def encode_fourbit(
        self, x: np.ndarray, dtype: str, table: str, group: int, packed: np.ndarray, absmax: np.ndarray
    ) -> None:
        super().encode_fourbit(x, dtype, table, group, packed, absmax)
        packed[-1] ^= 1


class Broken(CpuKernels):
    """Kernels of a GPU without memory."""

    def encode_fourbit(
        self, x: np.ndarray, dtype: str, table: str, group: int, packed: np.ndarray, absmax: np.ndarray
    ) -> None:
        raise RuntimeError("CUDA error: out of memory")


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that chooses between kernels of the CPU and of a GPU, for a scheme and bytes of source."""
    monkeypatch.setattr(threads, "RANGE", 1 << 14)
    monkeypatch.setattr(fastest, "RANGE", 1 << 14)
    monkeypatch.setattr(fastest, "may_have_gpu", lambda: True)
    fastest.encoded.cache_clear()

    def choice(host: Any, device: Any, scheme: Scheme = NF4, size: int = LARGE) -> tuple[str, str]:
        def kernels_of(name: str) -> Any:
            found = {"cpu": host, "cuda": device}[name]
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(fastest, "kernels_of", kernels_of)
        return fastest.fastest(scheme, "BF16", size, 2)

    yield choice
    fastest.encoded.cache_clear()


def test_a_gpu_that_encodes_faster_is_taken_and_both_speeds_are_said(choose: Any) -> None:
    name, why = choose(Slow(), CpuKernels())
    assert name == "cuda"
    assert why.startswith("2 threads encode 0.0 GB/s, cuda ")


def test_a_gpu_that_encodes_slower_is_left(choose: Any) -> None:
    name, why = choose(CpuKernels(), Slow())
    assert name == "cpu"
    assert why.endswith(", cuda 0.0")


def test_a_fast_gpu_of_other_bytes_is_left(choose: Any) -> None:
    name, why = choose(Slow(), Wrong())
    assert (name, why.split(", ")[-1]) == ("cpu", "but cuda stores other bytes")


@pytest.mark.parametrize("device", [Broken(), BadSpec("backend=cuda: it needs torch")])
def test_a_gpu_that_does_not_work_is_left(device: Any, choose: Any) -> None:
    assert choose(Slow(), device)[0] == "cpu"


@pytest.mark.parametrize(
    ("scheme", "size", "said"),
    [
        (NF4, 1 << 30, "so little is encoded before a GPU has started"),
        (Hqq(4, 64), LARGE, "on a GPU its search may find other codes; backend=cuda asks for them"),
        (Ggml("Q4_K"), LARGE, "on a GPU its search may find other codes; backend=cuda asks for them"),
        (Ggml("Q3_K"), LARGE, "no GPU stores the same bytes"),
        (Plain("BF16"), LARGE, "nothing is encoded"),
    ],
)
def test_without_a_choice_nothing_is_measured(scheme: Scheme, size: int, said: str, choose: Any) -> None:
    nobody = AssertionError("measured")
    assert choose(nobody, nobody, scheme, size) == ("cpu", said)


@pytest.mark.parametrize(
    "scheme",
    [Bnb4("nf4", double_quant=True), LlmInt8(), PackedInt(4, 128, symmetric=False), RowScaled("float"),
     MlxAffine(4, 64), Ggml("Q8_0"), Ternary()],
    ids=str,
)  # fmt: skip
def test_every_scheme_of_a_gpu_can_be_measured(scheme: Scheme, choose: Any) -> None:
    name, why = choose(CpuKernels(), CpuKernels(), scheme)
    assert name in ("cpu", "cuda")
    assert "2 threads encode " in why
    assert "bytes" not in why


def test_a_job_that_ends_before_a_gpu_starts_tries_none(choose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "START_S", float("inf"))
    name, why = choose(CpuKernels(), AssertionError("started"))
    assert name == "cpu"
    assert why.endswith(" GB/s, and so all of it before a GPU has started")


def test_without_the_files_of_a_driver_no_library_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux has files of drivers")
    assert not machine.may_have_gpu(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert machine.may_have_gpu(tmp_path)

    def imported(name: str) -> Any:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(devices, "_library", imported)
    monkeypatch.setattr(machine, "may_have_gpu", lambda: False)
    assert devices.best() == "cpu"
