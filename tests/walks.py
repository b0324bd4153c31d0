"""How many files three things walk through in a small job, counted while it runs: `python -m tests.walks`.

    bytes       one tensor's bytes, from storage to the shard and to the hash of it that the unit's record keeps
    group_size  quant.group_size, from the command line to the encoder
    errors      how far the tensor came out from its source, from the unit to MLflow's client

Every call and return in `jobs/` and `loaders/` is watched (`sys.setprofile`, on all threads). A file counts if one of
its functions, on the walk, had in hand what is followed: as an argument, a local or captured variable, its result, or
the result of a function that it called; itself, or inside plain dicts, lists, tuples and sets. One attribute may lie
between (a scheme's group_size), but not for bytes: a reader's map is not yet a tensor's. What lies deeper, in a plan, a
task, a report, is carried; files where it is only carried are listed, and do not count.

What is followed:
- bytes: arrays, memoryviews and bytes, of 64 bytes or more, with the tensor's source as it is stored, its codes, its
  scales or its decoded float32 values in their memory. The tensor takes two ranges on one thread, so that a buffer
  which is lent again with the first range's bytes still in it counts, and so the file that lends it. All functions are
  on the walk until the unit leaves its record. Another tensor lies before this one in source and output, or the 64 KiB
  that are read for a header would hold its first bytes.
- group_size: a typed word, or an attribute, key, argument or variable of a group size's name with the value.
- errors: the tensor's `ErrorSums`, added to others or not, or one of the numbers that follow from it. The walk begins
  where the unit gets it from `TensorEncoder.encode`; the files inside that are listed, and do not count.

A function is on the walk of group_size or errors if the end is reached inside it; if it stores what is followed in one
of its arguments; or if it gives it back, inside whatever else, to a function that is on the walk. So somebody who only
looks is not on it: the gate, a warning, a table for people. Work for a pool is called by whoever hands it over. The
end of group_size is its arrival in `loaders/quantization/kernels/`; ends of errors are all calls of log_batch and
log_dict of MLflow's client.

Compiled kernels have no frames; files of those that were called with the tensor's bytes are listed, and do not count.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
from numba.core.dispatcher import Dispatcher

from jobs.cli.main import main
from jobs.output.report import read_report
from jobs.report.metrics import metrics
from loaders.places import ROOT
from loaders.stats import ErrorSums
from loaders.storage.address import Address
from tests.making import LLAMA, Raw, read_safetensors, weights, write_checkpoint
from tests.watching import Files, IsIt, Walk, Watch

TENSOR = "model.layers.0.mlp.up_proj.weight"
SHAPE = (2304, 1024)  # more weights than a range has
GROUP = 512
GROUP_NAMES = ("group_size", "blocksize", "block_size", "group")
LIMITS = {"bytes": 8, "group_size": 11, "errors": 8}
PROBE = 64  # bytes by which memory is recognized
KERNELS = f"{ROOT / 'loaders' / 'quantization' / 'kernels'}{os.sep}"


def run(*arguments: str) -> None:
    """Run a job in this process."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = main(["run", "quant=nf4", "backend=cpu", "cluster=local", "cluster.threads=1", *arguments])
    assert status == 0, said.getvalue()


def make_source(folder: Path) -> Path:
    """A checkpoint of one matrix that is quantized, behind one that is not."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (96, 1024), TENSOR: SHAPE, "model.norm.weight": (1024,)}
    tensors = {name: weights(rng.standard_normal(shape) * 0.05, "BF16") for name, shape in shapes.items()}
    sizes = {"hidden_size": SHAPE[1], "intermediate_size": SHAPE[0], "num_hidden_layers": 1}
    return write_checkpoint(
        folder, tensors, config={**LLAMA, **sizes, "dtype": "bfloat16", "tie_word_embeddings": True}
    )


def walk_of_bytes(folder: Path) -> Walk:
    source, output = make_source(folder / "source"), folder / "output"
    arguments = [f"model.path={source}", f"output.path={output}", "tracking=none", "strategy=lazy"]
    run(*arguments)  # for what is stored; and it compiles all kernels, which cannot be while they are watched
    is_it = has_bytes(read_safetensors(source)[TENSOR], read_safetensors(output))
    fresh = patch.object(np, "empty", np.zeros)  # or fresh memory might hold the bytes that the first run left there
    with fresh, compiled_kernels(is_it) as compiled, Watch(is_it, leaves_record, first_end=True, slices=False) as watch:
        run(*arguments, "output.overwrite=true")
    return replace(watch.walk(), compiled=compiled)


def has_bytes(source: Raw, stored: Mapping[str, Raw]) -> IsIt:
    """Recognizes memory with the tensor's bytes in it."""
    codes, scales = stored[TENSOR].data.reshape(-1), stored[f"{TENSOR}.absmax"].data
    values = stored[f"{TENSOR}.quant_map"].data[np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)]
    decoded = values * scales.repeat(values.size // scales.size)
    wholes = [each.tobytes() for each in (source.data, codes, scales, decoded)]
    probes = [whole[at : at + PROBE] for whole in wholes for at in range(0, len(whole), len(whole) // 16)]

    def is_it(name: str, value: Any) -> bool:
        if not isinstance(value, np.ndarray | memoryview | bytes | bytearray):
            return False
        memory = value.tobytes() if isinstance(value, np.ndarray | memoryview) else bytes(value)
        if len(memory) < PROBE:
            return False
        return any(memory[:PROBE] in whole for whole in wholes) or any(probe in memory for probe in probes)

    return is_it


def leaves_record(frame: FrameType) -> bool:
    return frame.f_code.co_qualname == "Journal.add"


@contextmanager
def compiled_kernels(is_it: IsIt) -> Iterator[Files]:
    """Files of the compiled kernels that are called with what is followed. They must have been compiled before."""
    seen = Files()

    def watched(kernel: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = kernel(*arguments)
            if any(is_it("", each) for each in arguments):
                file = Path(kernel.py_func.__code__.co_filename).relative_to(ROOT)
                seen.setdefault(str(file), {})[kernel.py_func.__name__] = None
            return result

        return call

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            for attribute, value in list(vars(module).items()) if name.startswith("loaders.quantization") else ():
                if isinstance(value, Dispatcher):
                    stack.enter_context(patch.object(module, attribute, watched(value)))
        yield seen


def walk_of_group_size(folder: Path) -> Walk:
    arguments = [f"quant.group_size={GROUP}", f"model.path={make_source(folder / 'source')}", "tracking=none"]
    with Watch(has_group_size, encodes, first_end=True, slices=True) as watch:
        run(*arguments, f"output.path={folder / 'output'}")
    return watch.walk()


def has_group_size(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return f"group_size={GROUP}" in value
    return name in GROUP_NAMES and type(value) is int and value == GROUP


def encodes(frame: FrameType) -> bool:
    is_kernel = frame.f_code.co_filename.startswith(KERNELS)
    return is_kernel and any(has_group_size(*each) for each in frame.f_locals.items())


def walk_of_errors(folder: Path) -> Walk:
    source, output = make_source(folder / "source"), folder / "output"
    arguments = [f"model.path={source}", f"output.path={output}", f"output.root={folder}", "tracking=mlflow"]
    run(*arguments, "tracking=none")
    report = read_report(Address.of(str(output)))
    numbers: set[float | None] = {
        value for name, value in metrics(report).items() if name.startswith(("error", "sqnr")) and value
    }
    for each in (report.totals, report.totals.changed, *report.tensors):
        assert each is not None
        numbers |= {each.relative_error, each.sqnr_db, each.cosine} if each.relative_error else set()

    def is_it(name: str, value: Any) -> bool:
        return value.error2 > 0 if isinstance(value, ErrorSums) else type(value) is float and value in numbers

    with Watch(is_it, logs, first_end=False, slices=True) as watch:
        run(*arguments, "output.overwrite=true")
    return watch.walk(after="TensorEncoder.encode")


def logs(frame: FrameType) -> bool:
    return frame.f_code.co_qualname in ("MlflowClient.log_batch", "MlflowClient.log_dict")


WALKS = {"bytes": walk_of_bytes, "group_size": walk_of_group_size, "errors": walk_of_errors}


def lines(name: str, walk: Walk) -> Iterator[str]:
    """A walk for people."""
    others = {
        "before the unit has it": walk.before,
        "carried inside something": walk.carried,
        "compiled kernels": walk.compiled,
    }
    yield f"{name}: {len(walk.counted)} files, at most {LIMITS[name]}"
    yield from (f"    {file}: {', '.join(functions)}" for file, functions in walk.counted.items())
    for title, files in others.items():
        if files:
            yield f"  {title}, not counted: {len(files)} files"
            yield from (f"    {file}: {', '.join(functions)}" for file, functions in files.items())


def show() -> int:
    """Print all walks; 1 if one is too long."""
    is_too_long = False
    for name, follow in WALKS.items():
        with tempfile.TemporaryDirectory() as folder:
            walk = follow(Path(folder))
        print("\n".join(lines(name, walk)), flush=True)
        is_too_long |= len(walk.counted) > LIMITS[name]
    return int(is_too_long)


if __name__ == "__main__":
    sys.exit(show())
