"""Importance matrices for tests, in llama.cpp's two forms, made up by a fixed seed."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from loaders.containers import gguf
from loaders.dtypes import DTYPES
from loaders.specs import StoredSpec, StoredTensor

SEEN = 512  # tokens
KINDS = ("full", "partial", "zeroed", "unseen")
Sums = Mapping[
    str, tuple[np.ndarray, np.ndarray]
]  # by tensor: sums (matrices, columns) and counts (matrices,), float32

METADATA = {
    "general.type": gguf.text("imatrix"),
    "imatrix.datasets": gguf.texts(["made-up"]),
    "imatrix.chunk_count": gguf.uint32(7),
    "imatrix.chunk_size": gguf.uint32(512),
}


def sums_of(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], kind: str) -> dict:
    """Return sums for a GGUF's matrices, as llama-imatrix would measure them.

    partial: of the odd layers alone. zeroed: a third of the channels never saw anything but zeros. unseen: some experts
    never saw a token.
    """
    rng, made = np.random.default_rng(3), {}
    for name, (_, shape, _) in tensors.items():
        if len(shape) < 2 or not name.endswith(".weight") or name == "token_embd.weight" or "ffn_gate_inp" in name:
            continue
        if kind == "partial" and name.startswith("blk.") and int(name.split(".")[1]) % 2 == 0:
            continue
        matrices = shape[0] if len(shape) > 2 else 1
        values = rng.lognormal(0, 1.5, (matrices, shape[-1])).astype(np.float32)
        counts = np.full(matrices, SEEN, np.float32)
        if kind == "zeroed":
            values[:, rng.random(shape[-1]) < 1 / 3] = 0
        if kind == "unseen":
            counts[rng.random(matrices) < 0.4] = 0
        made[name] = values * counts[:, None], counts
    return made


def importances_of(sums: Sums) -> dict[str, np.ndarray]:
    """Return what llama-quantize makes of sums: means, and ones where nothing was seen; float32 (matrices, columns)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            name: np.where(counts[:, None] > 0, values / counts[:, None], 1).astype(np.float32)
            for name, (values, counts) in sums.items()
        }


def write_gguf(path: Path, sums: Sums, metadata: Mapping[str, gguf.MetadataValue] = METADATA) -> Path:
    """Write the form of today."""
    parts = {
        name + end: array.reshape(len(counts), -1)
        for name, (values, counts) in sums.items()
        for end, array in ((".in_sum2", values), (".counts", counts))
    }
    tensors = [StoredTensor(name, StoredSpec(DTYPES["F32"], array.shape)) for name, array in parts.items()]
    file = gguf.with_head(gguf.lay_out(path.name, tensors), metadata)
    raw = bytearray(file.size)
    raw[: file.header_bytes] = file.about
    for slot in file.slots:
        at = file.header_bytes + slot.offset
        raw[at : at + slot.size] = parts[slot.name].astype("<f4").tobytes()
    path.write_bytes(raw)
    return path


def write_dat(path: Path, sums: Sums, calls: int = 4, tail: bytes | None = None) -> Path:
    """Write the form of before 2025: means times the number of calls. Counts are not in it."""
    parts = [struct.pack("<i", len(sums))]
    for name, values in importances_of(sums).items():
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, values.size)]
        parts.append((values * np.float32(calls)).astype("<f4").tobytes())
    name = b"made-up"
    parts.append(struct.pack("<ii", 7, len(name)) + name if tail is None else tail)
    path.write_bytes(b"".join(parts))
    return path
