"""`python -m jobs.bench gpu`: what a GPU gives beside this machine's CPU, and what more cores give.

The parts are independent, and so are their trials: one that fails is a row that says why, and the rest goes on. Each
row is said as soon as it is there, since a run may be cut off; what had not begun after `minutes` is left out, and
said. `device=cpu` takes torch's CPU device for the GPU: that shows that everything here works before it is carried to
a machine that has one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jobs.benchmarks import gpu_bytes, gpu_jobs, gpu_loading, gpu_models, gpu_speed
from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.gpu_trials import Bench, Found, Row, Trial, tried
from jobs.cli.verb import FAILED, Said, note, show
from loaders.backends.devices import torch_device
from loaders.errors import BadSpec, WeightmillError

LIBRARIES = ("torch", "triton", "transformers", "bitsandbytes", "fastsafetensors", "hqq", "numpy", "numba")


# In the order in which they run; only `cores` needs no GPU
PARTS: dict[str, Callable[[Bench], Iterator[Trial]]] = {
    "bytes": gpu_bytes.trials,
    "speed": gpu_speed.trials,
    "jobs": gpu_jobs.whole_jobs,
    "cores": gpu_jobs.ladder,
    "loading": gpu_loading.trials,
    "models": gpu_models.trials,
}
WITHOUT_GPU = ("cores",)


def time_gpu(
    device: str, parts: Sequence[str], path: str | None, gb: float, shape: tuple[int, int], laps: int, minutes: float,
    folder: str | None, *, as_json: bool = False,
) -> Said:  # fmt: skip
    """The parts of these names, or all: a table, a document, and exit status 1 where a trial failed.

    Raises:
        BadSpec: an unknown part.
        WeightmillError: this machine has no such device, and a part needs it.
    """
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise BadSpec(f"parts: unknown {unknown[0]!r}; known: {', '.join(PARTS)}")
    chosen = [name for name in PARTS if name in parts or not parts]
    _check_device(device, chosen)
    busy, rows, took = Busy(), list[Row](), dict[str, float]()
    with tempfile.TemporaryDirectory(dir=folder, prefix="weightmill-bench-") as work:
        bench = Bench(
            device=device,
            parts=tuple(chosen),
            path=path,
            gb=gb,
            shape=shape,
            laps=laps,
            work=Path(work),
            ends=time.monotonic() + 60 * minutes,
        )
        for name in chosen:
            began = time.monotonic()
            for row in _rows(bench, name, minutes):
                note(row.line)
                rows.append(row)
            took[name] = round(time.monotonic() - began, 1)
            note(f"{name}: {took[name]} s in all")
    about = {"device": _described(device, chosen), "versions": _versions(), "source": path, "gb": gb, "repeats": laps,
             "part_s": took}  # fmt: skip
    said = _said(rows, {"machine": machine(), "busy": busy.document(), **about})
    if as_json:
        show(said.text)  # standard output has the document; one run on a borrowed machine is to leave both
    return said


def _check_device(device: str, chosen: Sequence[str]) -> None:
    needing = [name for name in chosen if name not in WITHOUT_GPU]
    if not needing:
        return
    try:
        torch_device(device)
    except BadSpec as error:
        found = "torch finds no such device here" if importlib.util.find_spec("torch") else "torch is not installed"
        raise WeightmillError(
            f"device={device}: {found}; device=cpu tries all of it on torch's CPU device,"
            f" parts=[{','.join(WITHOUT_GPU)}] needs no GPU"
        ) from error


def _rows(bench: Bench, name: str, minutes: float) -> Iterator[Row]:
    """The rows of a part; what comes up after the time is left out."""
    try:
        for trial in PARTS[name](bench):
            if bench.left_s > 0:
                yield tried(name, trial)
            else:
                yield Row(name, trial.name, Found(fault=f"left out: {minutes:g} minutes were over"))
    except Exception as error:  # what prepares the part's trials failed; the other parts do not hang on it
        yield Row(name, "the rest of the part", Found(fault=f"{type(error).__name__}: {error}"))


def _described(device: str, chosen: Sequence[str]) -> str | None:
    if all(name in WITHOUT_GPU for name in chosen):
        return None
    torch, target = torch_device(device)
    if target.type != "cuda":
        return f"torch's {device}"
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _said(rows: Sequence[Row], about: dict[str, Any]) -> Said:
    faults = [row for row in rows if row.found.fault]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("part", "case", "s", "GB/s", "found"):
        table.add_column(column, overflow="fold", justify="right" if column in ("s", "GB/s") else "left")
    for row in rows:
        found = Text(row.found.said)
        if row.found.fault:
            found.append(("; " if row.found.said else "") + row.found.fault, style="red")
        table.add_row(row.part, row.case, row.seconds, row.gbps, found)
    busy, versions = warning(about["busy"]), ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    text = Group(
        f"{about['machine']}; {about['device'] or 'no GPU asked for'}; {versions}",
        table,
        "GB/s: 1e9 bytes of the source a second, in whatever form it is taken",
        f"{len(faults)} of {len(rows)} trials failed" if faults else f"all {len(rows)} trials went well",
        *([] if busy is None else [Text(busy, style="yellow")]),
    )
    document = {
        "status": "failed" if faults else "done", **about, "faults": len(faults),
        "rows": [row.document for row in rows],
    }  # fmt: skip
    return Said(document, text, FAILED if faults else 0)
