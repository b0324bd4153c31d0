"""`weightmill bench gpu`: a GPU compared with this machine's CPU, and the gain by more CPU cores.

Parts and trials are independent: one that fails is a row with the reason, and the others go on. Each row is printed as
soon as it is there, since a run may be cut off; trials that have not begun after `minutes` are reported as left out.
`device=cpu` uses torch's CPU device in place of the GPU, to try the benchmark itself on a machine without one.
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

from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.gpu import bytes as same_bytes
from jobs.benchmarks.gpu import jobs, loading, models, speed
from jobs.benchmarks.gpu.trials import Bench, Found, Row, Trial, tried
from jobs.cli.verb import FAILED, Said, note, show
from loaders.backends.devices import torch_device
from loaders.errors import BadSpec, WeightmillError
from loaders.missing import absent, not_installed

LIBRARIES = ("torch", "triton", "transformers", "bitsandbytes", "fastsafetensors", "hqq", "numpy", "numba")


# The parts, in the order in which they run.
PARTS: dict[str, Callable[[Bench], Iterator[Trial]]] = {
    "bytes": same_bytes.trials,
    "speed": speed.trials,
    "jobs": jobs.whole_jobs,
    "cores": jobs.ladder,
    "loading": loading.trials,
    "models": models.trials,
}
WITHOUT_GPU = ("cores",)


def time_gpu(
    device: str, parts: Sequence[str], path: str | None, gb: float, shape: tuple[int, int], laps: int, minutes: float,
    folder: str | None, *, as_json: bool = False,
) -> Said:  # fmt: skip
    """Run the named parts, or all, and return a table and a document; the exit status is 1 if a trial failed.

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
        # Standard output has the document only, but a run on a borrowed GPU should leave both.
        show(said.text)
    return said


def _check_device(device: str, chosen: Sequence[str]) -> None:
    needing = [name for name in chosen if name not in WITHOUT_GPU]
    if not needing:
        return
    rest = f"parts=[{','.join(WITHOUT_GPU)}] needs no GPU"
    if lacks := absent("torch"):
        raise not_installed(f"device={device}", lacks, rest)
    try:
        torch_device(device)
    except BadSpec as error:
        raise WeightmillError(
            f"device={device}: torch finds no such device here; device=cpu tries all of it on torch's CPU device,"
            f" {rest}"
        ) from error


def _rows(bench: Bench, name: str, minutes: float) -> Iterator[Row]:
    """Yield the rows of a part; trials that come up after the time limit are left out."""
    try:
        for trial in PARTS[name](bench):
            if bench.left_s > 0:
                yield tried(name, trial)
            else:
                yield Row(name, trial.name, Found(fault=f"left out: {minutes:g} minutes were over"))
    # Preparing this part's trials failed, on which no other part depends.
    except Exception as error:
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
        # It is not installed; its version stays None.
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
