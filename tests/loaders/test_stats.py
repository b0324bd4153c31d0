"""CompressionStats: figures, sums, JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from loaders import BadCheckpoint, CompressionStats, ErrorSums, LayerStats, LoadStats


def made() -> CompressionStats:
    errors = {
        "a": ErrorSums(numel=100, error2=1.0, source2=100.0, decoded2=99.0, product=99.5, max_error=0.3),
        "b": ErrorSums(numel=300, error2=4.0, source2=100.0, decoded2=98.0, product=97.0, max_error=0.9),
    }
    layers = {name: LayerStats("bnb4", e.numel, 2 * e.numel, e.numel // 2, e) for name, e in errors.items()}
    return CompressionStats(
        tensors=3,
        parameters=500,
        source_bytes=1_000_000,
        output_bytes=300_000,
        error=sum(errors.values(), ErrorSums()),
        layer_stats=layers,
    )


def test_the_figures_are_what_their_names_say() -> None:
    stats = made()
    assert (stats.total_parameters, stats.original_size_mb, stats.quantized_size_mb) == (500, 1.0, 0.3)
    assert stats.compression_ratio == pytest.approx(10 / 3)
    assert stats.layer_stats["a"].error.relative_error == pytest.approx(0.1)
    assert stats.total_error == pytest.approx(math.sqrt(5 / 200))
    assert stats.mean_layer_error == pytest.approx(0.15)
    assert stats.max_layer_error == pytest.approx(0.2)
    assert repr(stats) == (
        "CompressionStats(3 tensors, 500 parameters: 1.00 MB -> 0.30 MB, 3.33x smaller, 4800.00 bits per weight,"
        " error 0.1581, 2 layers: mean error 0.15, max 0.2)"
    )
    assert (CompressionStats().mean_layer_error, CompressionStats().compression_ratio) == (0.0, 0.0)
    assert "layers" not in repr(CompressionStats())


@pytest.mark.quick
def test_they_add_up() -> None:
    one = made()
    other = CompressionStats(
        tensors=1,
        parameters=7,
        source_bytes=14,
        output_bytes=7,
        error=ErrorSums(numel=7),
        layer_stats={"c": LayerStats("hqq", 7, 14, 7, ErrorSums(numel=7))},
    )
    both = one + other
    assert (both.tensors, both.parameters, both.source_bytes, both.output_bytes) == (4, 507, 1_000_014, 300_007)
    assert list(both.layer_stats) == ["a", "b", "c"]
    assert list(one.layer_stats) == ["a", "b"]


def test_json_reads_back_equal_and_says_the_figures(tmp_path: Path) -> None:
    stats, path = made(), tmp_path / "stats.json"
    endless = ErrorSums(numel=3, error2=math.inf, source2=1.0, decoded2=1.0, product=1.0, max_error=math.inf)
    stats = stats + CompressionStats(
        tensors=1,
        parameters=3,
        source_bytes=6,
        output_bytes=3,
        error=endless,
        layer_stats={"c": LayerStats("mlx", 3, 6, 3, endless)},
    )
    stats.save(path)
    assert CompressionStats.load(path) == stats
    said = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert said["quantized_size_mb"] == stats.quantized_size_mb
    assert said["layer_stats"]["a"]["relative_error"] == pytest.approx(0.1)
    for wrong in ("[]", "{", '{"tensors": 1}', '{"layer_stats": [1]}'):
        path.write_text(wrong)
        with pytest.raises(BadCheckpoint, match="not saved by CompressionStats"):
            CompressionStats.load(path)


def test_throughput_is_gigabytes_of_source_a_second() -> None:
    assert LoadStats(bytes=3_000_000_000, wall_s=2.0).throughput_gbps == 1.5
    assert LoadStats().throughput_gbps == 0.0
    assert LoadStats(bytes=3_000_000_000, wall_s=2.0).throughput_gbps() == 1.5


def test_mean_squared_errors_stand_beside_relative_ones() -> None:
    stats = made()
    layer = stats.layer_stats["a"]
    assert layer.mse == pytest.approx(layer.error.error2 / layer.error.numel)
    assert (layer["num_params"], layer["compression_ratio"], layer["error"]) == (
        layer.num_params, layer.source_bytes / layer.output_bytes, layer.mse,
    )  # fmt: skip
    errors = [each.mse for each in stats.layer_stats.values()]
    assert (stats.mean_layer_mse, stats.max_layer_mse) == (pytest.approx(sum(errors) / len(errors)), max(errors))
    assert stats.total_mse == pytest.approx(stats.error.error2 / stats.error.numel)
    assert layer.relative_error == pytest.approx(0.1)
    with pytest.raises(KeyError):
        layer["else"]
    assert (CompressionStats().mean_layer_mse, CompressionStats().max_layer_mse, CompressionStats().total_mse) == (
        0,
        0,
        0,
    )
