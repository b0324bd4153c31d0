"""Models and their weights from a store that is not local: the same as from a folder, each byte fetched once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import configure, load_weights
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec
from loaders.loading import resources
from loaders.places import ROOT
from loaders.strategies.reading.segments import Segment, State
from loaders.tensors.sources import tensors_of
from tests import sources
from tests.shelf.places import Place, fill

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from loaders.models.loading import load_model_and_tokenizer  # noqa: E402  # needs torch
from loaders.models.weights import ModelWeights  # noqa: E402


@pytest.mark.parametrize("quantize", [None, "nf4", "hqq4"])
def test_a_model_from_a_url_computes_the_same(quantize: str | None, place_of: Callable[[str], Place]) -> None:
    model = ROOT / "jobs" / "demo"
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    address = fill(place_of("shelf"), model, "model")
    logits = []
    for where in (model, address.text):
        made, tokenizer = load_model_and_tokenizer(where, "cpu", quantize=quantize)
        assert tokenizer("To be")["input_ids"]
        with torch.no_grad():
            logits.append(made(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("is_output", [False, True])
def test_packed_weights_are_streamed_from_a_url(
    is_output: bool, tmp_path: Path, place_of: Callable[[str], Place], weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, into which they are encoded once, or as the store has them."""
    monkeypatch.setattr(resources, "_SHARED", [])
    cache = configure(workers=1, cache_folder=tmp_path / "cache").cache
    model, ids = ROOT / "jobs" / "demo", torch.tensor([[3, 1, 4, 1, 5]])
    if is_output:
        assert weightmill("run", "model=demo", "quant=nf4", f"output.path={tmp_path / 'out'}").status == 0
        model = tmp_path / "out"
    settings = {} if is_output else {"quantize": "nf4"}
    address = fill(place_of("shelf"), model, "model")
    made, _ = load_model_and_tokenizer(address.text, "cpu", strategy="streaming", **settings)
    assert len(cache.keys()) == (0 if is_output else 21)
    with torch.no_grad():
        wanted = load_model_and_tokenizer(model, "cpu", **settings)[0](ids).logits
        for _ in range(2):
            assert torch.equal(made(ids).logits, wanted)
    assert 0 < made.streamer.peak_bytes < 1.6e6
    made.streamer.close()


@pytest.mark.parametrize("settings", [{}, {"quantize": "nf4"}, {"dtype": "float32"}])
def test_weights_from_a_url_are_the_same(
    settings: dict[str, Any], tmp_path: Path, place_of: Callable[[str], Place]
) -> None:
    model = sources.base(tmp_path)
    address = fill(place_of("shelf"), model, "model")
    here, _ = load_weights(model, **settings)
    there, stats = load_weights(address.text, **settings)
    assert here.keys() == there.keys()
    assert stats.load.bytes > 0
    for name, tensor in here.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, there[name])
        else:
            assert np.array_equal(tensor.dequantize().float().numpy(), there[name].dequantize().float().numpy())


def test_what_went_to_a_device_is_not_held_any_more(
    tmp_path: Path, place_of: Callable[[str], Place], weightmill: Any
) -> None:
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={sources.base(tmp_path)}", f"output.path={out}", "quant=nf4").status == 0
    checkpoint = open_checkpoint(fill(place_of("shelf"), out, "model"))
    parameters = {tensor.name: (tensor,) for tensor in tensors_of(checkpoint, decode=True).tensors}
    assert any(tensor.decode is not None for [tensor] in parameters.values())
    with ModelWeights(checkpoint, parameters, read="remote") as weights:
        weights.expect(dict.fromkeys(parameters))
        for name, [tensor] in parameters.items():
            weights.fill(name, torch.empty(tensor.shape, dtype=torch.float32, device="meta"))
        assert left_of(weights) == []


def left_of(weights: ModelWeights) -> list[Segment]:
    """Return the segments that are in memory."""
    runs = weights._reader._ahead._runs.values()  # type: ignore[attr-defined]
    return [segment for each in runs for run in each for segment in run.segments if segment.state is State.THERE]


def test_what_libraries_load_themselves_needs_a_folder(
    tmp_path: Path, place_of: Callable[[str], Place], weightmill: Any
) -> None:
    out = tmp_path / "out"
    ran = weightmill("run", f"model.path={sources.base(tmp_path)}", f"output.path={out}", "quant=w4a16")
    assert ran.status == 0, ran.err
    address = fill(place_of("shelf"), out, "model")
    with pytest.raises(BadSpec, match="is no folder of this machine"):
        load_model_and_tokenizer(address.text, "cpu")
