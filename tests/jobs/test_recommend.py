"""jobs.recommend, and get_recommended_loader_config behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.cli import completions, overview
from loaders import BadSpec, get_recommended_loader_config
from loaders.recommending import PRESETS

DEMO = Path(__file__).parents[2] / "jobs" / "demo"
NAMES = sorted({name for names in PRESETS.values() for name in names})


@pytest.mark.parametrize("quant", NAMES)
def test_sizes_are_those_of_the_plan(quant: str, weightmill: Any) -> None:
    planned = weightmill("plan", f"model.path={DEMO}", f"quant={quant}", "format=json").document
    backend = next(name for name, names in PRESETS.items() if quant in names)
    found = get_recommended_loader_config(DEMO, backend, 100)
    [row] = [each for each in found.candidates if each.preset == quant]
    assert row.weight_bytes == planned["output"]["tensor_bytes"]
    assert row.bits_per_weight == pytest.approx(planned["output"]["bits_per_weight"])


def test_the_most_bits_that_fit_are_taken() -> None:
    everything = get_recommended_loader_config(DEMO, "cuda", 100)
    reserve = everything.reserve_bytes
    taken = []
    for each in everything.candidates:
        exactly = get_recommended_loader_config(DEMO, "cuda", (reserve + each.weight_bytes) / 1e9)
        assert exactly.candidates[len(taken)].weight_bytes == each.weight_bytes
        assert exactly.scheme == each.preset
        taken.append(exactly.scheme)
    assert taken == list(PRESETS["cuda"])
    less = get_recommended_loader_config(DEMO, "cuda", (reserve + everything.candidates[-1].weight_bytes - 1) / 1e9)
    assert less.scheme is None
    assert "nothing fits" in less.arithmetic[-1]
    with pytest.raises(BadSpec, match="nothing fits"):
        less.load_config()


def test_the_arithmetic_is_shown_and_right() -> None:
    found = get_recommended_loader_config(DEMO, "cuda", 24, context_tokens=4096)
    said = str(found)
    cache = 2 * 3 * 64 * 4096 * 2  # keys and values, layers, heads by their size, tokens, bytes
    active = 2048 * (8 * 256 + 3 * 512) * 2 + 1024 * 4
    assert found.reserve_bytes == cache + active + 1_000_000_000
    assert f"2 x 3 layers x 64 x 4096 tokens x 2 bytes = {cache / 1e6:.2f} MB" in said
    assert found.workers >= 1
    assert found.strategy in said
    config = found.load_config()
    assert config.quantize is None


def test_a_number_of_parameters_is_estimated() -> None:
    found = get_recommended_loader_config(8_000_000_000, "cuda", 12)
    assert found.candidates[0].bits_per_weight == 16
    assert found.scheme == "int8"  # 8 GB and a little; 12 less 1 of runtime and 2.4, a fifth, leaves 8.6
    assert get_recommended_loader_config(8_000_000_000, "cuda", 8).scheme == "nf4"  # 4.5 GB; 5.4 are left
    assert "estimated" in str(found)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(BadSpec, match="backend: unknown 'abacus'"):
        get_recommended_loader_config(DEMO, "abacus")
    with pytest.raises(BadSpec, match="available_memory_gb: expected more than 0, found -1"):
        get_recommended_loader_config(DEMO, "cpu", -1)


def test_the_verb_says_a_table_and_json(weightmill: Any) -> None:
    ran = weightmill("recommend", f"model.path={DEMO}", "backend=cuda", "backend.memory_gb=24")
    assert ran.status == 0, ran.err
    for part in ("24.00 GB for cuda", "hqq2", "taken", "quant=none strategy=", "room for weights"):
        assert part in ran.out
    document = weightmill(
        "recommend", f"model.path={DEMO}", "backend=mlx", "backend.memory_gb=0.5225", "format=json"
    ).document
    assert document["status"] == "done"
    assert document["scheme"] in PRESETS["mlx"]
    assert [row["preset"] for row in document["candidates"]] == list(PRESETS["mlx"])
    small = weightmill("recommend", f"model.path={DEMO}", "backend=cpu", "backend.memory_gb=0.1")
    assert small.status == 1
    assert "nothing fits" in small.out
    here = weightmill("recommend", f"model.path={DEMO}", "backend=cpu", "format=json").document
    assert here["available_bytes"] > 0


def test_the_verb_refuses_what_is_wrong(weightmill: Any) -> None:
    ran = weightmill("recommend", "backend.memory_gb=-1", "context_tokens=0", "nothing=1")
    assert ran.status == 2
    for name in ("backend.memory_gb", "context_tokens", "nothing"):
        assert name in ran.err
    assert "context_tokens" in weightmill("recommend", "--help").out


def test_the_verb_completes() -> None:
    assert "recommend" in overview()
    assert completions("weightmill rec") == ["recommend"]
    assert "backend.memory_gb=" in completions("weightmill recommend backend.m")
    assert completions("weightmill recommend backend=ml") == ["backend=mlx"]
