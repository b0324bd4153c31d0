"""quantize: tensors in memory, to the bytes that load_weights makes of a file of them, without copies of the whole."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import (
    BadSpec,
    Progress,
    QuantizedTensor,
    SafetensorsLoader,
    VerifyFailed,
    load_weights,
    preset_names,
    quantize,
)
from loaders.backends.memory import PeakMemory
from loaders.places import DEMO

torch = pytest.importorskip("torch")
MATRIX = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    """The demo's tensors."""
    return load_weights(DEMO)[0]


def parts_of(tensor: Any) -> Any:
    """Return the bytes of a tensor's parts, by role and by the engine's names; those of a plain tensor."""
    if isinstance(tensor, QuantizedTensor):
        return {role: bytes(part.view(np.uint8)) for role, part in tensor.parts.items()}, [*tensor.tensors()]
    return str(tensor.dtype), tuple(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("name", preset_names())
def test_bytes_are_those_of_a_file_of_the_same_tensors(name: str, demo: dict[str, Any]) -> None:
    from_file, _ = load_weights(DEMO, quantize=name)
    made = quantize(demo, name, config=json.loads((DEMO / "config.json").read_text()))
    assert {n: parts_of(t) for n, t in made.items()} == {n: parts_of(t) for n, t in from_file.items()}
    kept = [n for n, t in made.items() if not isinstance(t, QuantizedTensor) and t.dtype == demo[n].dtype]
    assert all(made[n] is demo[n] for n in kept), "what stays as it is, is not copied"


@pytest.mark.parametrize("name", [name for name in preset_names() if name != "none"])
def test_a_tensor_alone_needs_no_model(name: str) -> None:
    made = quantize(MATRIX, name)
    assert isinstance(made, QuantizedTensor)
    assert made.error is not None
    assert f"relative error {made.error.relative_error:.3g}" in repr(made)
    difference = (made.dequantize() - MATRIX).norm() / MATRIX.norm()
    assert float(difference) == pytest.approx(made.error.relative_error, rel=1e-3)
    assert {*made.by_role()} == {*made.parts}
    assert all(each.startswith("layer.") for each in made.tensors())


@pytest.mark.parametrize(
    "form",
    [
        lambda w: w.numpy(),
        lambda w: np.asfortranarray(w.numpy()),
        lambda w: w.t().contiguous().t(),
        lambda w: torch.nn.Parameter(w),
        lambda w: torch.stack([w, -w], dim=1)[:, 0],
        lambda w: w.numpy()[::-1].copy()[::-1],
        lambda w: w.numpy().astype(">f4"),
    ],
    ids=["numpy", "by columns", "transposed", "parameter", "every second", "backwards", "of another machine"],
)
def test_it_does_not_matter_how_a_tensor_lies(form: Any) -> None:
    assert parts_of(quantize(form(MATRIX), "nf4")) == parts_of(quantize(MATRIX, "nf4"))


def test_bfloat16_and_settings_and_names() -> None:
    made = quantize(MATRIX.bfloat16(), "nf4", name="model.head.weight", group_size=128, double_quant=True)
    assert str(made.dtype) == "BF16"
    assert "model.head.weight.nested_absmax" in made.tensors()
    assert made.to(torch.device("cpu")).dequantize("float32").dtype == torch.float32
    with pytest.raises(BadSpec, match="nowhere"):
        made.to("nowhere")


def test_nothing_is_copied_but_what_is_being_encoded() -> None:
    weights = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((2048, 4096), np.float32) for i in range(4)}
    quantize({"model.layers.9.mlp.up_proj.weight": np.ones((64, 4096), np.float32)}, "nf4")  # compiled by now
    with PeakMemory() as memory:
        made = quantize(weights, "nf4")
    held = sum(each.nbytes for each in made.values())
    # Each of the four is 33 MB, all are 134; beside the results there are ranges of some MiB a thread.
    assert memory.peak_bytes < held + 48e6


def test_progress_is_told_after_each_tensor_and_can_stop_it(demo: dict[str, Any]) -> None:
    told: list[Progress] = []
    made = quantize(demo, "nf4", progress=told.append)
    quantized = [name for name, each in made.items() if isinstance(each, QuantizedTensor)]
    assert sorted(each.last for each in told) == sorted(quantized)
    assert [each.done for each in told] == sorted(each.done for each in told)

    def stop(progress: Progress) -> None:
        raise KeyError(progress.last)

    with pytest.raises(KeyError):
        quantize(demo, "nf4", progress=stop)


def test_tied_tensors_are_one() -> None:
    embedding = torch.randn(64, 64)
    tied = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    config = {"model_type": "llama", "tie_word_embeddings": True}
    assert [*quantize(tied, "nf4", config=config)] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ("text", "layer.weight: expected a tensor of torch or an array of numpy, found str"),
        ({"a": [1.0]}, "a: expected a tensor of torch or an array of numpy, found list"),
        ({}, "tensors: expected some, found an empty mapping"),
        (torch.empty(4, 4, device="meta"), "found a meta tensor; load or convert it first"),
        (torch.eye(4).to_sparse(), "found torch.sparse_coo"),
        (np.ones((4, 4), np.complex128), "found complex128; cast it first"),
        (np.ones((4, 4), np.int32), "layer.weight"),
        (np.ones((4, 4), np.uint16), "layer.weight: expected a dtype of weights, found numpy's uint16"),
        ({"foo": torch.ones(64, 64)}, "tensors: none of 1 tensor is quantized (foo: no matrix of a linear layer)"),
    ],
    ids=str,
)
def test_what_is_no_tensor_of_weights_is_refused(tensors: Any, said: str) -> None:
    with pytest.raises(BadSpec) as refused:
        quantize(tensors, "nf4")
    assert said in str(refused.value)


def test_settings_and_values_are_checked_as_in_a_load(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match="'nf5'; did you mean 'nf4'"):
        quantize(MATRIX, "nf5")
    with pytest.raises(BadSpec, match="group_sise"):
        quantize(MATRIX, "nf4", group_sise=64)
    broken = MATRIX.clone()
    broken[3, 3] = float("nan")
    with pytest.raises(VerifyFailed, match="NaN"):
        quantize(broken, "nf4")


def test_weights_that_a_loader_gives_as_uint16_are_refused() -> None:
    stored = SafetensorsLoader().load_weights(DEMO)
    with pytest.raises(BadSpec, match=r"uint16, as which loaders give bfloat16; load it as torch's \(device='cpu'\)"):
        quantize(stored, "nf4")


def test_numpy_has_bfloat16_by_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    weights = MATRIX.bfloat16()
    array = weights.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    assert parts_of(quantize(array, "nf4")) == parts_of(quantize(weights, "nf4"))


def test_what_an_engine_keeps_is_noted_where_nothing_is_quantized() -> None:
    kept = {"model.norm.weight": torch.ones(64), "model.embed_tokens.weight": torch.ones(64, 64)}
    made = quantize(kept, "nf4")
    assert made["model.norm.weight"] is kept["model.norm.weight"]
    assert made.notes == ("none of 2 tensors is quantized (model.embed_tokens.weight: bitsandbytes keeps embeddings)",)
    assert quantize({"foo": torch.ones(64, 64)}, "none").notes == ()


def test_mlx_asks_for_the_config() -> None:
    with pytest.raises(BadSpec, match=r"config: a model without model_type .*; give its config.json as config="):
        quantize({"model.layers.0.mlp.up_proj.weight": MATRIX}, "mlx_int4")
    assert isinstance(quantize(MATRIX, "mlx_int4"), QuantizedTensor)


def test_remedies_are_those_of_python() -> None:
    ragged = torch.ones(64, 77)
    for preset in ("w4a16", "mlx_int4", "ternary"):
        with pytest.raises(BadSpec, match="leave it out, or let a job keep it by") as refused:
            quantize(ragged[:62], preset)
        assert "to keep it:" not in str(refused.value)
    with pytest.raises(BadSpec, match=r"rules: no such setting; they are a job's: weightmill.run\(..., rules=...\)"):
        quantize(MATRIX, "nf4", rules="[]")
    with pytest.raises(VerifyFailed, match="with allow_nonfinite=True$"):
        quantize(torch.full((64, 64), float("nan")), "nf4")


@pytest.mark.parametrize("preset", ["nf4", "hqq4", "w4a16", "mlx_int4", "gguf_q4_0", "ternary"])
def test_quantized_tensors_are_copied_and_pickled(preset: str) -> None:
    made = quantize(MATRIX, preset)
    file = io.BytesIO()
    torch.save({"a": made}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)["a"]
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), saved):
        assert repr(other) == repr(made)
        assert parts_of(other) == parts_of(made)
        assert torch.equal(other.dequantize(), made.dequantize())


def test_a_mapping_is_shown_in_a_line_and_has_its_size(demo: dict[str, Any]) -> None:
    config = {"model_type": "llama"}
    made = quantize(demo, "nf4", config=config)
    size = sum(each.nbytes for each in made.values())
    assert made.nbytes == size
    assert repr(made) == f"QuantizedWeights(29 tensors, 21 quantized (bnb4), {size:,} bytes)"
    for other in (made.copy(), copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert (other.config, [*other], other.nbytes) == (config, [*made], size)
    assert quantize(demo, "none").nbytes == sum(each.nbytes for each in demo.values())


@pytest.mark.parametrize("device", ["CPU", "cpu:0"])
def test_the_cpu_goes_by_other_names(device: str) -> None:
    assert quantize(MATRIX, "nf4", device=device).device == "cpu"
    assert quantize(MATRIX, "nf4").to(device).device == "cpu"
    for weights in (
        load_weights(DEMO, device=device)[0],
        load_weights(DEMO, quantize="nf4", device=device)[0],
        SafetensorsLoader().load_weights(DEMO, device),
    ):
        assert str(weights["model.norm.weight"].device) == "cpu"
