"""A test that the Python of docs/library.md runs, as that of the README does, and that it has every described name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import loaders
from tests.readme import README
from tests.test_readme import run_blocks

PAGE = README.parent / "docs" / "library.md"
# The names of the described interfaces of weight loading, and of loading with quantization.
DESCRIBED = [
    "WeightFormat",
    "WeightSpec",
    "LoadStats",
    "AtomicWriter",
    "atomic_writer",
    "WeightLoader",
    "SafetensorsLoader",
    "MultiThreadWeightLoader",
    "FastSafetensorsLoader",
    "StreamingWeightLoader",
    "detect_weight_format",
    "get_file_lock_path",
    "compute_weight_hash",
    "compute_weight_hash_rust",
    "validate_weight_shapes",
    "validate_weight_shapes_rust",
    "filter_shared_tensors",
    "safetensors_weights_iterator",
    "multi_thread_safetensors_weights_iterator",
    "fastsafetensors_weights_iterator",
    "runai_safetensors_weights_iterator",
    "pt_weights_iterator",
    "multi_thread_pt_weights_iterator",
    "gguf_quant_weights_iterator",
    "WeightLoaderConfig",
    "CheckpointLoader",
    "load_weights",
    "load_and_quantize",
    "create_aggressive_config",
    "CompressionStats",
]


@pytest.mark.quick
@pytest.mark.parametrize("name", DESCRIBED)
def test_a_described_name_is_public_and_on_the_page(name: str) -> None:
    assert name in loaders.__all__
    assert re.search(rf"\b{name}\b", PAGE.read_text())


@pytest.mark.engine
def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTMILL_CACHE", str(tmp_path / "cache"))
    assert run_blocks(PAGE, tmp_path) == PAGE.read_text().count("```python")
