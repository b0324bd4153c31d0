"""Recommend a quantization that fits a memory: weightmill recommend model.path=DIR backend.memory_gb=24."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from pydantic import Field

from jobs.cli.verb import FAILED, Said, Verb
from jobs.spec.base import Columns, Format, LocalPath, Spec
from jobs.spec.job import BackendSpec, ModelSpec, SourceSpec
from jobs.spec.store import StoreSpec
from jobs.tracking.sources import located

if TYPE_CHECKING:
    from loaders.loading.recommend import Recommendation

ENGINES = {"cuda": "vllm", "cpu": "gguf", "mlx": "mlx"}  # the engine of quant=auto by backend


class MemorySpec(BackendSpec):
    """conf/backend: the device on which the model is to run, and its memory."""

    memory_gb: float | None = Field(
        gt=0, description="gigabytes (1e9 bytes) for weights and everything else; null: what is free here"
    )


class MeasuredRoot(Spec):
    """The folder of the measurements of quant=auto."""

    root: LocalPath = Field(description="the output.root of jobs with quant=auto, whose measurements are used")


class RecommendSpec(Spec):
    """The settings of `recommend`."""

    model: ModelSpec
    source: SourceSpec
    backend: MemorySpec
    output: MeasuredRoot
    context_tokens: int = Field(
        gt=0, description="the length of a sequence whose keys and values must fit besides the weights"
    )
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")
    columns: Columns = "fit"


def act(spec: RecommendSpec) -> Said:
    """Recommend a preset and a strategy; the exit status is 1 if nothing fits."""
    from rich.console import Group

    from jobs.report.tables import size, table
    from loaders.checkpoints.checkpoint import open_checkpoint
    from loaders.errors import BadSpec
    from loaders.layouts.diffusers import is_of_diffusers
    from loaders.loading.recommend import get_recommended_loader_config

    checkpoint = open_checkpoint(spec.model.address, spec.source.container)
    if is_of_diffusers(checkpoint):
        raise BadSpec(
            f"model.path: {checkpoint.address} is of diffusers, and what is recommended here is for language"
            " models; see weightmill plan with quant=nf4, fp4 or int8"
        )
    found = get_recommended_loader_config(
        checkpoint, spec.backend.kind, spec.backend.memory_gb, context_tokens=spec.context_tokens
    )
    numbers = ("weights", "bits per weight", "fits")
    fitting, refused = table("quant", *numbers, right=numbers), dict[str, list[str]]()
    for each in found.candidates:
        if each.weight_bytes is None or each.bits_per_weight is None:
            refused.setdefault(each.why, []).append(each.preset)
            continue
        verdict = "taken" if each.preset == found.scheme else "yes" if each.fits else "no"
        fitting.add_row(each.preset, size(each.weight_bytes), f"{each.bits_per_weight:.2f}", verdict)
    others = [f"{', '.join(presets)}: not possible: {why}" for why, presets in refused.items()]
    steps = [line for line in found.arithmetic if not line.startswith("  ")]
    take = [] if found.scheme is None else ["", f"quant={found.scheme} strategy={found.strategy}"]
    measured, shown = by_measured_errors(spec, found)
    document = {
        "status": "failed" if found.scheme is None else "done",
        "path": str(checkpoint.address),
        **found.to_json(),
        "measured": measured,
    }
    take += shown
    return Said(
        document, Group(*steps[:-1], "", fitting, *others, "", steps[-1], *take), FAILED if found.scheme is None else 0
    )


def by_measured_errors(spec: RecommendSpec, found: Recommendation) -> tuple[list[dict[str, Any]] | None, list[Any]]:
    """Rank what fits by measured errors, if quant=auto has measured this checkpoint; else say how to measure it.

    Returns:
        The rows, or None if nothing was measured; and the lines to show.
    """
    from jobs.cli.compose import compose, take_apart
    from jobs.mixed_precision.search import known_within
    from jobs.report.tables import size, table
    from jobs.spec.job import JobSpec
    from loaders.errors import BadSpec

    room, engine = found.available_bytes - found.reserve_bytes, ENGINES.get(found.backend)
    if engine is None or room <= 0 or found.scheme == "none":
        return None, []
    # The budget is rounded down to four digits, for people to read.
    step = 10 ** max(0, len(str(room)) - 4)
    words = ["quant=auto", f"quant.engine={engine}", f"quant.target_gb={math.floor(room / step) * step / 1e9:g}"]
    given = [
        f"model.path={spec.model.path}",
        f"source.container={spec.source.container}",
        f"output.root={spec.output.root}",
    ]
    # The measurements are found by planning the job that would use them, under the settings that are given here.
    try:
        known = known_within(compose("run", JobSpec, take_apart("run", JobSpec, [*given, *words])))
    except BadSpec as error:
        return None, ["", f"{' '.join(words)}: {error}"]
    if known is None:
        return None, [
            "",
            f"{' '.join(words)} measures what each loses, and writes the mix that loses least in that room",
        ]
    rows: list[dict[str, Any]] = [
        {"quant": name, "bytes": size_, "weighted_error": error} for name, size_, error in known.candidates
    ]
    if known.mix is not None:
        mixed = {"quant": " ".join(words), "bytes": known.mix.target.weight_bytes}
        rows.append({**mixed, "weighted_error": known.mix.choice.error})
    rows.sort(key=lambda row: row["weighted_error"])
    numbers = ("weights", "weighted error")
    shown = table("measured, what fits and loses least", *numbers, right=numbers)
    for row in rows:
        shown.add_row(row["quant"], size(row["bytes"]), f"{row['weighted_error']:.4g}")
    return rows, ["", shown]


VERB = Verb(
    name="recommend",
    summary="Which quantization of a model fits a memory, by size and by measured errors. Reads headers only.",
    spec=RecommendSpec,
    act=act,
    located=located,
    examples=(
        ("DIR", "for this machine; the same as model.path=DIR"),
        ("DIR backend=cuda backend.memory_gb=24", "for another one's GPU"),
        ("DIR backend=mlx backend.memory_gb=16 format=json", "for a program"),
    ),
    positional=("model.path",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
