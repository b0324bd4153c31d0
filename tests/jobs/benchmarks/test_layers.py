"""`bench layers`: sizes and errors of small layers, and the sizes of BitNet's shapes."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.benchmarks import layers


def test_small_layers_are_loaded_and_measured(weightmill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "QUANTS", ("ternary", "ternary_aggressive", "nf4"))
    monkeypatch.setattr(layers, "FILE_BYTES", 400_000)
    monkeypatch.setattr(layers, "LAYERS", 1)
    ran = weightmill("bench", "layers", "repeats=1", "format=json")
    assert ran.status == 0, ran.err
    rows = {(row["source"], row["quant"]): row for row in ran.document["rows"]}
    assert len(rows) == 8
    two = rows["two layers", "ternary"]
    assert two["mb"] == pytest.approx(4 * (64 * 128 + 128 * 256) / 1e6)
    # The mean square of x - t * mean|x| over a normal distribution, t the nearest of -1, 0, 1, is 0.264.
    assert two["mean_mse"] == pytest.approx(0.264, abs=0.01)
    assert two["seconds_a_layer"] == pytest.approx(two["median_s"] / 2)
    nf4 = rows["two layers", "nf4"]
    assert nf4["ratio"] > ran.document["published"]["ratio"]
    assert nf4["max_mse"] < ran.document["published"]["max_mse"]
    bitnet = rows["BitNet 1.3B", "ternary_aggressive"]
    assert (bitnet["mean_mse"], bitnet["median_s"]) == (None, None)
    assert bitnet["ratio"] > rows["BitNet 1.3B", "ternary"]["ratio"]
