"""Comparing two checkpoints tensor by tensor: which are equal, and the errors of the others."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from rich.console import Group, RenderableType

from jobs.cli.progress import Meter
from jobs.cli.verb import DONE, FAILED, Said
from jobs.report.tables import in_a_line, table
from loaders.architectures.family import natural_key
from loaders.backends import kernels_of
from loaders.backends.machine import usable_cpus
from loaders.backends.threads import Crew, ThreadedWork
from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.dtypes import DTYPES, WEIGHT_DTYPES, DType
from loaders.quantization.kernels import casts, compare, cpu
from loaders.quantization.scheme import View
from loaders.stats import ErrorSums, finite
from loaders.strategies import WeightLoader, auto, loader
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.sources import tensors_of
from loaders.tensors.uses import Uses
from loaders.tensors.views import view_of
from loaders.words import counted

EQUAL, DIFFERENT = "equal", "different"
FLOAT32 = DTYPES["F32"]
A_ROUNDING = 2**-8  # the most of a relative error that rounding to bfloat16 makes
SHOWN = 40  # rows of tensors that differ, unless all are asked for


def compare_checkpoints(a: str, b: str, *, all_tensors: bool) -> Said:
    """Compare the tensors of two checkpoints by name; errors are relative to `a`, and quantized tensors are decoded.

    As of diff, the exit status is 1 if anything differs.

    Raises:
        BadSpec, BadCheckpoint: one of them cannot be opened.
    """
    one, other = open_checkpoint(a, key="a"), open_checkpoint(b, key="b")
    are_named = _as_stored if one.container == other.container == "gguf" else list
    ours, theirs = (
        {tensor.name: tensor for tensor in are_named(tensors_of(each, decode=True, split=True).tensors)}
        for each in (one, other)
    )
    common = sorted((name for name in ours if name in theirs), key=natural_key)
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        specs = [[spec for name in common for _, spec in side[name].stored] for side in (ours, theirs)]
        readers = [
            stack.enter_context(_loader(checkpoint).open(checkpoint.source, found))
            for checkpoint, found in zip((one, other), specs, strict=True)
        ]
        crew = stack.enter_context(Crew(usable_cpus()))
        meter = stack.enter_context(Meter("comparing", sum(ours[name].spec.size for name in common)))
        work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())

        one_use, other_use = (
            Uses(reader, [side[name] for name in common], in_one_trip=True)
            for side, reader in zip((ours, theirs), readers, strict=True)
        )

        def looked(name: str, *dtypes: DType) -> dict[str, Any]:
            """Compare two tensors, quantized ones decoded to the dtypes."""
            x, y = (
                view_of(side[name], reader, work, dtype)
                for side, reader, dtype in zip((ours, theirs), readers, dtypes, strict=True)
            )
            return _row(ours[name], theirs[name], x, y, work)

        def look(name: str) -> None:
            with one_use.of(name), other_use.of(name):
                # In float32 an error is what a job has measured, without another rounding.
                row = looked(name, FLOAT32, FLOAT32)
                # What was decoded into a plain checkpoint was rounded to its dtype.
                if row["relative_error"] is not None and row["relative_error"] < A_ROUNDING:
                    rounded = looked(name, theirs[name].dtype, ours[name].dtype)
                    row = rounded if rounded["status"] == EQUAL else row
                rows[name] = row
            meter.add(ours[name].spec.size)

        work.each(common, look)
    found = [rows[name] for name in common]
    only = [sorted(set(one) - set(other), key=natural_key) for one, other in ((ours, theirs), (theirs, ours))]
    equal = sum(row["status"] == EQUAL for row in found)
    differs = equal < len(found) or any(only)
    document = {
        "status": DIFFERENT if differs else EQUAL,
        "a": str(one.address),
        "b": str(other.address),
        "equal": equal,
        "different": len(found) - equal,
        "only_in_a": only[0],
        "only_in_b": only[1],
        "total": _total(found),
        "tensors": [row for row in found if all_tensors or row["status"] == DIFFERENT],
    }
    return Said(document, _text(document, all_tensors=all_tensors), FAILED if differs else DONE)


def _as_stored(tensors: Sequence[LogicalTensor]) -> list[LogicalTensor]:
    """Return a GGUF's tensors under the GGUF's own names, but for those that are parts of a stored tensor."""
    parts = Counter(spec.name for tensor in tensors for _, spec in tensor.stored)
    return [
        replace(tensor, name=tensor.stored[0][1].name)
        if len(tensor.stored) == 1 and parts[tensor.stored[0][1].name] == 1
        else tensor
        for tensor in tensors
    ]


def _total(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the errors over all weights that were compared, as of one tensor."""
    sums = ErrorSums.total(ErrorSums(**row["sums"]) for row in rows if "sums" in row)
    return {"parameters": sums.numel, **_measures(sums)}


def _measures(error: ErrorSums) -> dict[str, Any]:
    return {
        "relative_error": finite(error.relative_error),
        "sqnr_db": finite(error.sqnr_db),
        "cosine": error.cosine,
        "max_error": error.max_error,
    }


def _loader(checkpoint: Checkpoint) -> WeightLoader:
    name, _ = auto.choose(checkpoint.source, [entry.name for entry in checkpoint.files], by_ranges=True)
    return loader(name)


def _row(one: LogicalTensor, other: LogicalTensor, x: View, y: View, work: ThreadedWork) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": one.name,
        "a": one.stored_as,
        "b": other.stored_as,
        "status": DIFFERENT,
        "relative_error": None,
        "sqnr_db": None,
        "cosine": None,
        "max_error": None,
        "why": "",
    }
    if one.shape != other.shape:
        return {**row, "why": f"shapes {list(one.shape)} and {list(other.shape)}"}
    if x.spec.dtype.name not in WEIGHT_DTYPES or y.spec.dtype.name not in WEIGHT_DTYPES:
        if x.spec.dtype != y.spec.dtype:
            return {**row, "why": f"dtypes {one.dtype} and {other.dtype}"}
        # The two views read into different slots, since buffers are shared by name within a thread.
        same = all(work.sweep(one.spec.num_items, 1, lambda s, e: np.array_equal(x.read(s, e), y.read(s, e, 1))))
        return {**row, "status": EQUAL} if same else {**row, "why": "other values"}
    error = _errors(x, y, work)
    if error.max_error == 0 and not error.nonfinite and not error.nonfinite_decoded:
        return {**row, "status": EQUAL, "sums": asdict(error)}
    return {
        **row,
        **_measures(error),
        "why": f"{error.nonfinite + error.nonfinite_decoded} not finite" if error.nonfinite else "",
        "sums": asdict(error),
    }


def _errors(x: View, y: View, work: ThreadedWork) -> ErrorSums:
    def compare_range(start: int, stop: int) -> np.ndarray:
        sums = compare.new_sums()
        decoded = casts.to_float32(y.read(start, stop, 1), y.spec.dtype.name)
        cpu.compare_into(x.read(start, stop), x.spec.dtype.name, decoded, sums)
        return sums

    total = compare.new_sums()
    for sums in work.sweep(x.spec.numel, 1, compare_range):
        compare.merge(total, sums)
    return compare.error_sums(x.spec.numel, total)


def _rank(row: Mapping[str, Any]) -> float:
    """Return how far a tensor differs; what cannot be compared differs most."""
    error = row["relative_error"]
    return math.inf if error is None else float(error)


def _text(document: dict[str, Any], *, all_tensors: bool) -> RenderableType:
    found, most = document["tensors"], len(document["tensors"]) if all_tensors else SHOWN
    worst = sorted(range(len(found)), key=lambda index: _rank(found[index]), reverse=True)[:most]
    shown = [found[index] for index in sorted(worst)]
    numbers = ("relative error", "SQNR dB", "max error", "cosine")
    compared = table("tensor", *numbers, "", "a", "b", right=numbers, names=("tensor",), once=True)
    for row in shown:
        said = f"{row['status']}: {row['why']}" if row["why"] else row["status"]
        compared.add_row(row["name"], *_cells(row), said, row["a"], row["b"])
    total, count = document["total"], document["equal"] + document["different"]
    lines: list[RenderableType] = [compared] if shown else []
    if len(shown) < len(found):
        lines.append(f"the {len(shown)} that differ most, in the model's order; tensors=all lists every tensor")
    lines.append(f"{counted(count, 'tensor')}: {document['equal']} equal, {document['different']} different")
    if total["parameters"] and total["relative_error"] != 0:
        said = zip(("relative error", "SQNR dB", "max error", "cosine"), _cells(total), strict=True)
        lines.append(
            f"over all {total['parameters']:,} weights: {', '.join(f'{what} {value}' for what, value in said)}"
        )
    for side in ("a", "b"):
        names = document[f"only_in_{side}"]
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > 8 else ""
            lines.append(in_a_line(f"only in {document[side]}: {', '.join(names[:8])}{more}"))
    return Group(*lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    formats = (("relative_error", ".5f"), ("sqnr_db", ".2f"), ("max_error", ".4g"), ("cosine", ".6f"))
    return ["" if row[key] is None else format(row[key], spec) for key, spec in formats]
