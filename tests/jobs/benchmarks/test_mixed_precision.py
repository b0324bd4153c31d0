"""How mixes are judged: beside what has their size."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks.mixed_precision import JudgedOutput, against, plot, rows
from loaders.models.quality import Quality


def case(name: str, kind: str, bits: float, kl: list[float], beside: str | None = None) -> JudgedOutput:
    values: dict[str, Any] = {field.name: 1.0 for field in fields(Quality)}
    mean = sum(kl) / len(kl)
    quality = Quality(**{**values, "kl": mean, "kl_low": mean, "kl_high": mean, "kl_by_window": tuple(kl)})
    return JudgedOutput(name=name, kind=kind, bits=bits, quality=quality, beside=beside)


def test_a_mix_is_held_against_what_has_its_size(tmp_path: Path) -> None:
    low, high = case("low", "uniform", 4.0, [0.1, 0.3]), case("high", "uniform", 6.0, [0.001, 0.003])
    preset = case("preset", "preset", 5.0, [0.03, 0.05])
    mix = case("auto 5.00", "auto", 4.999, [0.01, 0.03], beside="preset")
    found = against(mix, [low, high])
    assert found is not None
    assert found.value == pytest.approx(0.02 / (0.2 * 0.01**0.4995), rel=1e-9)  # halfway in the logarithm, nearly
    assert found.low <= found.value <= found.high
    assert against(case("x", "auto", 7.0, [1.0, 1.0]), [low, high]) is None
    by_name = {row["name"]: row for row in rows([low, high, preset, mix])}
    assert by_name["auto 5.00"]["preset"] == "preset"
    assert by_name["auto 5.00"]["to_preset"][0] == pytest.approx(0.5)
    assert by_name["low"]["to_uniform"] is None
    plot([low, high, preset, mix], "a model", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
