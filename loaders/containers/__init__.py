"""Containers: the file formats of weights, with their headers and offsets. Nothing here knows of models or engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loaders.clock import Clock
from loaders.containers import gguf, packed, pytorch, pytorch_pieces, pytorch_write, safetensors
from loaders.containers.base import Container
from loaders.containers.writer import ShardWriter
from loaders.specs import OutputFile

__all__ = ["CONTAINERS", "Container", "ShardWriter", "writer_of"]

CONTAINERS = {
    container.name: container
    for container in (
        Container(
            name="safetensors",
            read_specs=safetensors.read_specs,
            lay_out=safetensors.lay_out,
            place=safetensors.place,
            frame=safetensors.frame,
            suffixes=(".safetensors",),
            single="model.safetensors",
            shard="model-{number:05d}-of-{count:05d}.safetensors",
            index="model.safetensors.index.json",
        ),
        Container(
            name="packed",
            read_specs=packed.read_specs,
            lay_out=packed.lay_out,
            place=packed.place,
            frame=packed.frame,
            suffixes=(),
            single=f"{packed.WEIGHTS}.00001",
            shard=packed.WEIGHTS + ".{number:05d}",
            index=None,
        ),
        Container(
            name="pytorch",
            read_specs=pytorch.read_specs,
            lay_out=pytorch_write.lay_out,
            place=pytorch_write.place,
            frame=pytorch_write.frame,
            suffixes=(".bin", ".pt", ".pth"),
            single="pytorch_model.bin",
            shard="pytorch_model-{number:05d}-of-{count:05d}.bin",
            index="pytorch_model.bin.index.json",
        ),
        Container(
            name="gguf",
            read_specs=gguf.read_specs,
            lay_out=gguf.lay_out,
            place=gguf.place,
            frame=gguf.frame,
            suffixes=(".gguf",),
            single="model.gguf",
            shard="model-{number:05d}-of-{count:05d}.gguf",
            index=None,
        ),
    )
}


# Not a container of its own: a range of a PyTorch file that one unit writes; see pytorch_pieces.py.
PIECES = {"pytorch piece": replace(CONTAINERS["pytorch"], place=pytorch_pieces.place, frame=pytorch_pieces.frame)}


def writer_of(path: Path, file: OutputFile, start: int | None = None, clock: Clock | None = None) -> ShardWriter:
    """Create a planned file at a path and return its writer; with `start`, write into the existing file from that byte.

    Writing counts on the clock.
    """
    return ShardWriter(path, file, (CONTAINERS | PIECES)[file.container], start, clock)
