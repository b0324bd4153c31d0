"""`weightmill bench budget`: mixes of quant=auto compared with uniform schemes and the engine's own mixes by size.

Outputs are compared by the KL divergence of their logits and by perplexity on a held-out text, which is not what
quant=auto minimizes. Outputs run decoded in transformers, which is fast, as engines' CPU kernels are not; with
`in_engine` they run in their own engine. Intervals are 95 % bootstraps over the text's windows; those of a ratio draw
the same windows for both outputs. If no uniform scheme has a mix's size, its KL is interpolated between the two schemes
around it, linearly in bits and log KL.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group

from jobs.cli.compose import compose, take_apart
from jobs.cli.verb import Said, note
from jobs.orchestration.source_pass import run_job
from jobs.report.plots import drawn
from jobs.report.tables import table
from jobs.spec.job import JobSpec
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec, io_errors
from loaders.models.evaluating import WINDOW, Reference, judge, read_windows
from loaders.models.quality import FEWEST, Quality
from loaders.models.runners import engine_of_folder
from loaders.presets.auto import AutoQuant
from loaders.presets.catalog import preset
from loaders.presets.settings import Quant

RECIPES = ("mixed_3_6", "mixed_4_6")
MIXES: dict[str, dict[str, dict[str, Any]]] = {
    "mlx": {f"mlx_{r}": {"preset": "mlx_mixed_4_6", "recipe": r} for r in RECIPES},
    "gguf": {
        "gguf_q4_k_m": {"preset": "gguf_q4_k_m"},
        "gguf_q5_k_m": {"preset": "gguf_q5_k_m"},
    },
}  # fmt: skip
BITS = (3.0, 6.0)  # bits per weight between which mixes are made, at the sizes of presets and uniform schemes
COLORS = ("tab:blue", "tab:green", "tab:orange")
RESAMPLES = 10_000  # of the bootstrap, as in loaders/models/quality.py
SIDES = (2.5, 97.5)  # percentiles of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class JudgedOutput:
    """One evaluated output. `kind` is "uniform", "preset", or "auto" with its weighting.

    `beside` names the uniform scheme or preset whose size was a mix's budget.
    """

    name: str
    kind: str
    bits: float
    quality: Quality
    beside: str | None = None
    expected: float | None = None  # the KL that the planner expected

    @property
    def kl_by_window(self) -> np.ndarray:
        """The mean KL of each window in nats per token, shape (W,)."""
        return np.array(self.quality.kl_by_window)


@dataclass(frozen=True)
class Ratio:
    """The ratio of two outputs' KL, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def budget(
    model: str,
    text: str,
    engine: str,
    calibration: str | None,
    root: Path,
    folder: str | None,
    tokens: int,
    *,
    in_engine: bool,
) -> Said:
    """Make and evaluate all outputs.

    Raises:
        WeightmillError: an output cannot be made or evaluated.
    """
    with io_errors("making", Path(folder or tempfile.gettempdir())):
        scratch = Path(tempfile.mkdtemp(prefix="weightmill-budget-", dir=folder))
    try:
        judged = _Judged(model, text, tokens, scratch / "logits", in_engine=in_engine)
        cases = _cases(model, judged, engine, calibration, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    with io_errors("making", root):
        root.mkdir(parents=True, exist_ok=True)
    title = f"{Path(model).name}, {engine}, run by {cases[0].quality.engine}"
    picture = drawn(root / f"budget-{Path(model).name}-{engine}.png", lambda path: plot(cases, title, path))
    return _said(cases, model, engine, picture)


def _cases(model: str, judged: _Judged, engine: str, calibration: str | None, scratch: Path) -> list[JudgedOutput]:
    base = _spec(model, scratch, engine, 16.0, None)
    assert isinstance(base.quant, AutoQuant)
    makes = _Making(base, judged, scratch)
    fixed: dict[str, Quant] = dict(base.quant.candidates)
    cases = [makes.case(name, "uniform", quant) for name, quant in fixed.items()]
    for name, settings in MIXES[engine].items():
        given = dict(settings)
        cases.append(makes.case(name, "preset", preset(given.pop("preset"), **given)))
    inner = [case for case in cases if BITS[0] <= case.bits <= BITS[1]]
    for beside in sorted(inner, key=lambda case: case.bits):
        for how in dict.fromkeys((None, calibration)):
            kind = "auto" if how is None else "auto, self" if how == "self" else "auto, calibrated"
            # The factor keeps rounding from making the budget a byte smaller than the output that it stands for.
            quant = _spec(model, scratch, engine, beside.bits * (1 + 1e-12), how).quant
            cases.append(replace(makes.case(f"{kind} {beside.bits:.2f}", kind, quant), beside=beside.name))
    return cases


def _spec(model: str, scratch: Path, engine: str, bits: float, calibration: str | None) -> JobSpec:
    how = [] if calibration is None else [f"quant.calibration={calibration}"]
    given = [f"model.path={model}", f"output.root={scratch}", "tracking=none", "quant=auto", f"quant.engine={engine}"]
    return compose("run", JobSpec, take_apart("run", JobSpec, [*given, f"quant.target_bits={bits!r}", *how]))


class _Judged:
    """The original's predictions of the text, with which outputs are compared."""

    def __init__(self, model: str, text: str, tokens: int, folder: Path, *, in_engine: bool) -> None:
        checkpoint = open_checkpoint(model)
        windows = read_windows(checkpoint, text, tokens=tokens, window=WINDOW)
        if len(windows.ids) < FEWEST:
            raise BadSpec(
                f"text: expected {FEWEST} windows of {WINDOW} tokens, found {len(windows.ids)}; give more text"
            )
        self._reference = Reference(checkpoint, windows)
        self._in_engine = in_engine
        self._folder = folder
        folder.mkdir()

    def quality(self, out: Path) -> Quality:
        output = open_checkpoint(out)
        engine = engine_of_folder(output) if self._in_engine else None
        return judge(self._reference, output, engine, self._folder)


class _Making:
    """A maker of outputs, which are evaluated and removed again."""

    def __init__(self, base: JobSpec, judged: _Judged, scratch: Path) -> None:
        self._base = base
        self._judged = judged
        self._scratch = scratch

    def case(self, name: str, kind: str, quant: Quant) -> JudgedOutput:
        note(f"{name} ...")
        out = self._scratch / "out"
        output = self._base.output.model_copy(update={"path": str(out)})
        with redirect_stderr(io.StringIO()):
            document = run_job(self._base.model_copy(update={"quant": quant, "output": output})).document
            quality = self._judged.quality(out)
        shutil.rmtree(out)
        chosen = document["job"]["quant"].get("chosen")
        expected = chosen["error"] if chosen and document["job"]["quant"]["calibration"] else None
        return JudgedOutput(
            name=name, kind=kind, bits=document["totals"]["bits_per_weight"], quality=quality, expected=expected
        )


# --- results


def against(case: JudgedOutput, others: Sequence[JudgedOutput]) -> Ratio | None:
    """Return an output's KL over that of the others at its size, interpolated; None if its size is not among theirs."""
    # A single one is the preset whose size was the budget: the mix is at most a few bytes smaller.
    if len(others) == 1:
        return _ratio_to(case, others[0], others[0], 0.0)
    ordered = sorted(others, key=lambda other: other.bits)
    low = next((c for c in reversed(ordered) if c.bits <= case.bits * (1 + 1e-6)), None)
    high = next((c for c in ordered if c.bits >= case.bits * (1 - 1e-6)), None)
    if low is None or high is None:
        return None
    return _ratio_to(case, low, high, 0.0 if low is high else (case.bits - low.bits) / (high.bits - low.bits))


def _ratio_to(case: JudgedOutput, low: JudgedOutput, high: JudgedOutput, share: float) -> Ratio:
    """Return an output's KL over that at a point between two others, where `share` is 0 at `low` and 1 at `high`."""
    count = len(case.kl_by_window)
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))

    def ratio(pick: Any) -> Any:
        logs = [np.log(c.kl_by_window[pick].mean(-1)) for c in (case, low, high)]
        return np.exp(logs[0] - (1 - share) * logs[1] - share * logs[2])

    lower, upper = np.percentile(ratio(drawn), SIDES)
    return Ratio(float(ratio(np.arange(count))), float(lower), float(upper))


def rows(cases: Sequence[JudgedOutput]) -> list[dict[str, Any]]:
    """Return the rows of the table as JSON: each mix with its ratios to uniform schemes and the preset of its size."""
    uniform = [case for case in cases if case.kind == "uniform"]
    named = {case.name: case for case in cases}
    found = []
    for case in sorted(cases, key=lambda c: (c.bits, c.kind)):
        quality = case.quality
        beside = named[case.beside] if case.beside is not None and named[case.beside].kind == "preset" else None
        found.append(
            {
                "name": case.name, "kind": case.kind, "bits_per_weight": case.bits,
                "kl": quality.kl, "kl_interval": [quality.kl_low, quality.kl_high],
                "perplexity": quality.perplexity, "perplexity_original": quality.perplexity_original,
                "perplexity_ratio": quality.perplexity_ratio,
                "perplexity_ratio_interval": [quality.perplexity_ratio_low, quality.perplexity_ratio_high],
                "top1": quality.top1, "expected_kl": case.expected,
                "to_uniform": _json(against(case, uniform) if case.kind != "uniform" else None),
                "preset": None if beside is None else beside.name,
                "to_preset": _json(None if beside is None else against(case, [beside])),
            }
        )  # fmt: skip
    return found


def _json(ratio: Ratio | None) -> list[float] | None:
    return None if ratio is None else [ratio.value, ratio.low, ratio.high]


def _said(cases: Sequence[JudgedOutput], model: str, engine: str, picture: Path | None) -> Said:
    found = rows(cases)
    numbers = (
        "bits per weight",
        "KL, nats a token",
        "perplexity over the original's",
        "KL to uniform's",
        "to the preset's",
    )
    shown = table("output", *numbers, right=numbers)
    for row in found:
        low, high = row["kl_interval"]
        below, above = row["perplexity_ratio_interval"]
        shown.add_row(
            row["name"], f"{row['bits_per_weight']:.3f}", f"{row['kl']:.5f} [{low:.5f}, {high:.5f}]",
            f"{row['perplexity_ratio']:.4f} [{below:.4f}, {above:.4f}]", _ratio(row["to_uniform"]),
            _ratio(row["to_preset"]) + (f" {row['preset']}" if row["preset"] else ""),
        )  # fmt: skip
    quality = cases[0].quality
    drew = [] if picture is None else [str(picture)]
    document = {"status": "done", "model": model, "engine": engine, "rows": found, "picture": next(iter(drew), None)}
    means = [
        f"{kind}: {_mean(cases, kind)}" for kind in dict.fromkeys(c.kind for c in cases) if kind.startswith("auto")
    ]
    return Said(
        document,
        Group(
            f"{model}, {engine}, run by {quality.engine}; {quality.tokens} tokens, {quality.windows} windows; [95 %]",
            shown,
            "KL over uniform's at the same size, geometric mean of all sizes: " + "; ".join(means),
            *(f"picture: {path}" for path in drew),
        ),
    )


def _ratio(value: list[float] | None) -> str:
    return "" if value is None else str(Ratio(*value))


def _mean(cases: Sequence[JudgedOutput], kind: str) -> str:
    uniform = [case for case in cases if case.kind == "uniform"]
    found = [r.value for c in cases if c.kind == kind and (r := against(c, uniform)) is not None]
    return f"{np.exp(np.mean(np.log(found))):.3f}" if found else "-"


def plot(cases: Sequence[JudgedOutput], title: str, path: Path) -> None:
    """Draw KL and perplexity against bits per weight, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    looks: Mapping[str, dict[str, Any]] = {
        "uniform": {"color": "gray", "marker": "s", "linestyle": "-"},
        "preset": {"color": "black", "marker": "*", "linestyle": "", "markersize": 11},
    }
    for index, kind in enumerate(dict.fromkeys(case.kind for case in cases)):
        mine = sorted((case for case in cases if case.kind == kind), key=lambda case: case.bits)
        look = looks.get(kind, {"color": COLORS[index % len(COLORS)], "marker": "o", "linestyle": "-", "markersize": 4})
        bits = [case.bits for case in mine]
        for axes, parts in (
            (left, ("kl", "kl_low", "kl_high")),
            (right, ("perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high")),
        ):
            shift = 0.0 if axes is left else 1.0
            value, low, high = (np.array([getattr(case.quality, part) - shift for case in mine]) for part in parts)
            spread = np.clip(np.stack([value - low, high - value]), 0, None)
            axes.errorbar(bits, value, yerr=spread, label=kind, capsize=2, linewidth=1, **look)
    left.set(xlabel="bits per weight", ylabel="KL of the logits, nats a token", yscale="log", title=title)
    right.set(xlabel="bits per weight", ylabel="perplexity over the original's, less 1", title="bars: 95 % intervals")
    right.set_yscale("symlog", linthresh=1e-3)
    left.legend()
    figure.savefig(path, dpi=120)


def check(model: str | None, text: str | None, engine: str) -> None:
    """Check the settings of the benchmark.

    Raises:
        BadSpec: a setting is missing, or the engine does not run here.
    """
    problems = [f"{name}: missing; give {name}={what}" for name, what, value in (
        ("model.path", "DIR", model), ("text", "FILE, of text that the model has not seen", text)
    ) if value is None]  # fmt: skip
    if engine not in MIXES:
        problems.append(f"engine: expected {' or '.join(MIXES)}, found {engine}: their outputs run here")
    if problems:
        raise BadSpec(problems)
