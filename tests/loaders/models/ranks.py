"""Runs as one rank of several: loads a model in some ways, one after another, and prints what each held and whether it
is right.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from loaders.backends.memory import PeakMemory
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.models import open_weights, skeleton_of
from loaders.models.config import LoadingStrategy
from loaders.models.loading import load_model_and_tokenizer
from loaders.models.sharding import broadcast, load_sharded, rows_of, scatter
from loaders.tensors.sources import tensors_of


def main(models: list[tuple[str, list[str], bool]]) -> None:
    """Folders, the ways to load each, and whether it computes."""
    assert threading.current_thread() is threading.main_thread()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for folder, ways, does_compute in models:
        for way in ways:
            print("RESULT " + json.dumps(load(folder, way, does_compute)), flush=True)
            dist.barrier()
    dist.destroy_process_group()


def load(folder: str, way: str, does_compute: bool) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    sources = tensors_of(checkpoint, decode=True)
    dist.barrier()  # the backend's own buffers are there before memory is counted
    with PeakMemory() as memory:
        if way == "broadcast":
            model = load_model_and_tokenizer(folder, "cpu", strategy=LoadingStrategy.LOW_MEMORY)[0]
            started_meta = all(p.is_meta for p in model.parameters())
            broadcast(model)
        else:
            started_meta = dist.get_rank() > 0
            full = None
            if way == "scatter":
                full = load_model_and_tokenizer(folder, "cpu", strategy=LoadingStrategy.LOW_MEMORY)[0]
                started_meta = all(p.is_meta for p in full.parameters())
            skeleton = skeleton_of(checkpoint, sources)
            model = skeleton.model
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            if way == "scatter":
                scatter(skeleton, full)
            else:
                with open_weights(checkpoint, skeleton, workers=1) as weights:
                    load_sharded(skeleton, weights)
    result = {
        "rank": dist.get_rank(),
        "right": check(model, checkpoint, sources),
        "held": sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters()),
        "total": sum(p.nbytes for p in model.parameters()),
        "peak": memory.peak_bytes,
        "started_meta": started_meta,
    }
    if does_compute:
        with torch.no_grad():
            result["logits"] = model(torch.arange(3, 20)[None]).logits.float().flatten()[:512].tolist()
    return result


def check(model: torch.nn.Module, checkpoint: object, sources: object) -> bool:
    """Every shard against the files, by safetensors' own reading."""
    from safetensors import safe_open

    root = checkpoint.address.path  # type: ignore[attr-defined]
    files = {r.name: r.stored[0][1].file for r in sources.tensors}  # type: ignore[attr-defined]
    opened = {file: safe_open(Path(root) / file, "pt") for file in set(files.values())}
    for name, parameter in model.named_parameters():
        part = opened[files[name]].get_slice(name)
        if isinstance(parameter, DTensor):
            start, stop = rows_of(parameter)
            if stop > start and not torch.equal(parameter.to_local(), part[start:stop]):
                return False
        elif not torch.equal(parameter.data, part[:]):
            return False
    return True


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
