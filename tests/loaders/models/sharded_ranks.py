"""Starts ranks that load sharded models, and prints what each of them found: `python -m ... REQUEST`.

The libraries are imported once, then each rank is a fork: importing takes longer than all that the ranks do.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import torch.distributed as dist
import torch.multiprocessing
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from loaders.backends.memory import PeakMemory
from loaders.errors import BadCheckpoint, BadSpec, WeightmillError
from loaders.models import cutting, load_model_and_tokenizer, load_sharded_model, save_adapter, trained_weights
from loaders.models import fsdp as sharded
from loaders.models.weights import ModelWeights

Found = dict[str, Any]
IDS = torch.arange(8 * 24).reshape(8, 24) * 7 % 1000 + 3
STEPS = 3
M_MMAP_THRESHOLD = -3  # malloc.h
WITHOUT_GROUP = ("alone", "program")  # worlds that start without one
LIMIT_S = 200  # of a world: what hangs is killed


def with_adapters(kind: str) -> Callable[[Any], Any]:
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], use_dora=kind == "dora")
    return lambda model: get_peft_model(model, config)


def with_a_float(model: Any) -> Any:
    """Give a matrix of bfloat16 a parameter of float32 beside it."""
    model.model.layers[0].mlp.up_proj.scale = torch.nn.Parameter(torch.ones(1))
    return model


def train(model: Any, ids: torch.Tensor) -> list[float]:
    """Train some steps; returns the losses before each, over all ranks that have a part of the batch."""
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def over_ranks(losses: list[float]) -> list[float]:
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).tolist()  # type: ignore[no-any-return]


def own_rows() -> torch.Tensor:
    return IDS[dist.get_rank() :: dist.get_world_size()]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[:2]).logits  # type: ignore[no-any-return]


# --- what ranks are asked to do


def trains(fsdp: int, path: str, quantize: str | None, kind: str, folder: str) -> Found:
    """Train adapters, save them, and load them into an unsharded model."""
    torch.manual_seed(dist.get_rank())  # rank 0's adapters are everyone's
    model = load_sharded_model(path, None, quantize, fsdp=fsdp, prepare=with_adapters(kind))
    losses = over_ranks(train(model, own_rows()))
    save_adapter(model, folder)
    mine, packed_anew = logits(model), logits(model.eval())
    found = {"losses": losses, "in_eval": torch.equal(mine, packed_anew) and torch.equal(mine, logits(model))}
    again = load_sharded_model(
        path, init_device_mesh("cpu", (dist.get_world_size(),)), quantize, fsdp=fsdp,
        prepare=lambda base: PeftModel.from_pretrained(base, folder, is_trainable=True),
    )  # fmt: skip
    found["resumed"] = torch.equal(mine, logits(again))
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        plain = with_adapters(kind)(load_model_and_tokenizer(path, "cpu", quantize=quantize)[0])
        found["plain_losses"] = train(plain, IDS)
        base = load_model_and_tokenizer(path, "cpu", quantize=quantize)[0]
        # Of a cut model peft adapts layers before they are bitsandbytes', by its plain class, which rounds elsewhere.
        base.is_loaded_in_4bit = False
        # In training mode: in the other, bitsandbytes may compute by another kernel.
        theirs = logits(PeftModel.from_pretrained(base, folder).train())
        found["saved"] = (mine - theirs).abs().max().item() / theirs.abs().max().item()
        found["files"] = sorted(each.name for each in Path(folder).iterdir())
    return found


def trains_new_blocks(fsdp: int, path: str, quantize: str | None, expanded: Mapping[str, Any]) -> Found:
    model = load_sharded_model(path, None, quantize, fsdp=fsdp, **expanded)
    before = {name: value.clone() for name, value in trained_weights(model).items()}
    losses = over_ranks(train(model, own_rows()))
    after = trained_weights(model)
    plain = load_model_and_tokenizer(path, "cpu", quantize=quantize)[0].train()
    return {
        "losses": losses,
        "plain_loss": plain(input_ids=IDS, labels=IDS).loss.item(),
        "trained": sorted(after),
        "changed": sorted(name for name in after if not torch.equal(before[name], after[name])),
        "packed": sum(type(each).__name__ == "Linear4bit" for each in model.modules()),
    }


def holds(fsdp: int, path: str, quantize: str | None, before: str) -> Found:
    """Load a model, and say what this rank held; a small one before, which brings all code in."""
    load_sharded_model(before, None, quantize, fsdp=fsdp)
    # glibc's malloc takes small pieces from what it kept of freed ones, which would not be counted.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    dist.barrier()
    with PeakMemory() as memory:
        model = load_sharded_model(path, None, quantize, fsdp=fsdp)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
    states = [getattr(each, "quant_state", None) for each in model.modules()]
    kept = sum(each.absmax.nbytes for each in states if each is not None)
    return {"peak": memory.peak_bytes, "held": held, "states": kept}


def repacks_nothing(path: str) -> Found:
    """On any machine: bitsandbytes is told that its CPU would have weights packed anew."""
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: True
    model = load_sharded_model(path, None, "nf4")
    layers = [each for each in model.modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]
    first = logits(model.train())
    return {
        "guarded": [each.support_avx512bf16_for_cpu for each in layers],
        "equal": all(torch.equal(first, logits(model.eval())) for _ in range(2)),
        "repacked": [getattr(each.quant_state, "packing_format_for_cpu", False) for each in layers],
    }


def refused(path: str, first: Mapping[str, Any], others: Mapping[str, Any]) -> Found:
    """Ask for what is refused; rank 0 by the first settings, the others by the second. No weight may be read."""
    settings = {"path": path, **(first if dist.get_rank() == 0 else others)}
    reads = []
    with replaced(ModelWeights, "fill", lambda *_: reads.append(1)):
        return {"error": error_of(lambda: load_sharded_model(**settings)), "reads": len(reads)}


def refuses_places(path: str) -> Found:
    """Meshes and groups that cannot be, and models that `prepare` spoils."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = dist.new_group([0])
    found = {
        "mesh of two dimensions": lambda: load_sharded_model(path, init_device_mesh("cpu", (1, world))),
        "a number": lambda: load_sharded_model(path, world),
        "nothing returned": lambda: load_sharded_model(path, prepare=lambda model: None),
        "copies": lambda: load_sharded_model(path, prepare=lambda model: get_peft_model(
            model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))),
        "casts": lambda: load_sharded_model(path, prepare=lambda model: model.float()),
        "other adapters": lambda: load_sharded_model(path, prepare=with_adapters("dora" if rank else "lora")),
        "mixed": lambda: load_sharded_model(path, fsdp=1, prepare=with_a_float),
        "saved as a whole": lambda: load_sharded_model(path, None, "nf4").save_pretrained("/nowhere"),
        "no adapter": lambda: save_adapter(load_sharded_model(path), "/nowhere"),
    }  # fmt: skip
    if rank:
        found["group of others"] = lambda: load_sharded_model(path, alone)
    with replaced(sharded, "find_spec", lambda name: None):
        without = {"no engine": error_of(lambda: load_sharded_model(path, None, "nf4"))}
    with replaced(cutting, "_outermost", lambda *_: iter(())):
        without["no blocks"] = error_of(lambda: load_sharded_model(path))
    return without | {name: error_of(work) for name, work in found.items()}


def fails(path: str, rank: int, what: str) -> Found:
    """A fault of one rank while weights are loaded; then all load once more."""
    where: Any = ModelWeights if what == "encoded" else sharded
    before, calls = getattr(where, what), []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 and dist.get_rank() == rank:
            raise BadCheckpoint("shard 3 is damaged") if what == "encoded" else MemoryError("no room")
        return before(*arguments)

    with replaced(where, what, failing):
        error = error_of(lambda: load_sharded_model(path, None, "nf4"))
    return {"error": error, "again": logits(load_sharded_model(path, None, "nf4")).float().sum().item()}


def is_killed(path: str) -> Found:
    """Rank 0 dies; the others must end, by an error of their backend."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with replaced(ModelWeights, "encoded", die):
        return {"error": error_of(lambda: load_sharded_model(path, None, "nf4"), Exception)}


def runs_programs(folder: str, training: str, loading: str) -> Found:
    """Run a program as torchrun does, in a folder with the demo; rank 0 then runs one that loads what it saved."""
    os.chdir(folder)
    exec(compile(training, "training", "exec"), {"__name__": "__main__"})
    after: dict[str, Any] = {"__name__": "__main__"}
    if os.environ["RANK"] == "0":
        exec(compile(loading, "loading", "exec"), after)
    return {"adapters": sum(name.endswith("lora_A.default") for name, _ in after["model"].named_modules())
            if "model" in after else None}  # fmt: skip


def without_group(path: str) -> Found:
    return {"error": error_of(lambda: load_sharded_model(path))}


# --- the ranks themselves


def error_of(work: Callable[[], Any], kinds: Any = WeightmillError) -> str | None:
    try:
        work()
    except kinds as error:
        return f"{'BadSpec' if isinstance(error, BadSpec) else type(error).__name__}: {error}"
    return None


@contextmanager
def replaced(where: Any, name: str, by: Any) -> Iterator[None]:
    before = getattr(where, name)
    setattr(where, name, by)
    try:
        yield
    finally:
        setattr(where, name, before)


Tasks = list[tuple[str, dict[str, Any]]]


def run(rank: int, world: str, count: int, port: int, tasks: Tasks) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "RANK": f"{rank}", "WORLD_SIZE": f"{count}"}
    if world not in WITHOUT_GROUP:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for number, (name, arguments) in enumerate(tasks):
        found = globals()[name](**arguments)
        print(f"RESULT {json.dumps([world, number, rank, found])}\n", end="", flush=True)
    if dist.is_initialized() and world != "killed":
        dist.destroy_process_group()


def main(worlds: Mapping[str, tuple[int, Tasks]]) -> None:
    """Start the ranks of each world, one world after another: so many, for these tasks."""
    context = torch.multiprocessing.get_context("fork")
    for world, (count, tasks) in worlds.items():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [context.Process(target=run, args=(rank, world, count, port, tasks)) for rank in range(count)]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(LIMIT_S)
            each.kill()
            each.join()
        print(f"ENDED {json.dumps([world, [each.exitcode for each in ranks]])}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
