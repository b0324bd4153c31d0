"""What a calibration says of a weight's errors is what they then cost: the divergence of the logits, measured."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.mixed_precision.candidate_errors import reordered
from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.dtypes import dtype_named
from loaders.errors import BadCheckpoint
from loaders.models.sensitivity import importances_of, load, save
from loaders.quantization.importance import Importance, weighted_error
from loaders.quantization.memory_parts import MemoryParts
from loaders.quantization.schemes.mlx_affine import MlxAffine
from loaders.specs import RowOrder, TensorSpec
from loaders.tensors.views import ReorderedView


class Held:
    """A view of an array."""

    def __init__(self, values: np.ndarray) -> None:
        self.spec = TensorSpec("w.weight", dtype_named("F32"), values.shape)
        self._flat = values.reshape(-1)

    def read(self, start: int, stop: int, slot: int = 0) -> np.ndarray:
        return self._flat[start:stop]


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, LlamaForCausalLM]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model", made


def test_it_foretells_the_divergence_that_errors_bring(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, made = model
    told: list[int] = []
    found = importances_of(folder, None, 2048, told.append)
    assert sum(told) == 2 * 2048
    weights = {name: p for name, p in made.named_parameters() if p.ndim == 2}
    assert set(found) == set(weights)
    assert len(found["model.embed_tokens.weight"]) == 2  # looked up, and multiplied by
    ids = made.generate(torch.full((8, 1), 1), do_sample=True, top_k=0, max_new_tokens=200, min_new_tokens=200)
    with torch.inference_mode():
        before = torch.log_softmax(made(input_ids=ids).logits.double(), -1)
        for name, weight in weights.items():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.01
            weight += noise
            after = torch.log_softmax(made(input_ids=ids).logits.double(), -1)
            weight -= noise
            measured = float((before.exp() * (before - after)).sum(-1).mean())
            squares = noise.square().numpy()
            expected = sum(float(each.rows @ squares @ each.columns) for each in found[name])
            # Fisher's diagonal for independent errors: within a factor, for a few thousand weights and tokens
            assert 0.5 < expected / measured < 2, name


def test_it_is_kept_as_it_is(tmp_path: Path) -> None:
    one = {"a.weight": (Importance(np.arange(3, dtype=np.float32), np.ones(2, np.float32)),)}
    save(one, tmp_path / "x" / "y.npz")
    again = load(tmp_path / "x" / "y.npz")
    assert list(again) == ["a.weight"]
    np.testing.assert_array_equal(again["a.weight"][0].rows, one["a.weight"][0].rows)
    np.testing.assert_array_equal(again["a.weight"][0].columns, one["a.weight"][0].columns)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="transformers cannot load"):
        importances_of(tmp_path, None, 256)


def test_a_weighted_error_is_the_sum_over_weights() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((70, 64 * 601)).astype(np.float32)  # ranges end within rows
    view, scheme = Held(values), MlxAffine(4, 64)
    importances = [
        Importance(rng.random(70).astype(np.float32), rng.random(64 * 601).astype(np.float32)) for _ in range(2)
    ]
    with Crew(2) as crew:
        work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
        parts = MemoryParts(scheme.stored(view.spec))
        scheme.encode(view, parts, work)
        decoded = np.empty(values.size, np.float32)
        scheme.decode(view.spec, parts, 0, values.size, decoded, work)
        found = weighted_error(view, scheme, view.spec, parts, importances, work)
    squares = (values.astype(np.float64) - decoded.reshape(values.shape)) ** 2
    wanted = sum(each.rows.astype(np.float64) @ squares @ each.columns for each in importances)
    assert found == pytest.approx(wanted, rel=1e-4)  # float32 sums of 38,464 squares


@pytest.mark.parametrize("inverse", [False, True])
def test_rows_matter_in_the_consumers_order(inverse: bool) -> None:
    rows = np.arange(24, dtype=np.float32)
    order = RowOrder(8, inverse)
    seen = ReorderedView(Held(np.repeat(rows[:, None], 3, 1)), order).read(0, 72).reshape(24, 3)[:, 0]
    np.testing.assert_array_equal(reordered(Importance(rows, rows), order).rows, seen)
