"""jobs.diff: two checkpoints, tensor by tensor, whatever they are stored as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.places import DEMO
from tests.making import Raw, llama_tensors, make_source, read_safetensors, values_of, weights, write_checkpoint


def test_diff_names_the_side_that_is_missing(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("diff", source, tmp_path / "none")
    assert ran.status == 2
    assert "b: expected a folder" in ran.err


@pytest.mark.parametrize("quant", ["nf4", "ternary"])
def test_diff_decodes_quantized_tensors(quant: str, source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", f"quant={quant}", "format=json")
    recorded = {row["name"]: row for row in ran.document["tensors"]}
    document = weightmill("diff", source, out, "format=json").document
    assert (document["equal"], document["different"]) == (7, 14)
    assert document["only_in_a"] == document["only_in_b"] == []
    for row in document["tensors"]:
        if row["status"] == "different":
            assert row["relative_error"] == pytest.approx(recorded[row["name"]]["relative_error"], rel=1e-5)


@pytest.mark.quick
def test_diff_names_what_differs_and_what_is_only_on_one_side(tmp_path: Path, weightmill: Any) -> None:
    one, other = llama_tensors(), llama_tensors()
    other["model.norm.weight"].data[3] += 1
    other["extra"] = other.pop("lm_head.weight")
    other["model.layers.0.mlp.up_proj.weight"] = Raw("BF16", other["model.layers.0.mlp.up_proj.weight"].data.T.copy())
    a, b = write_checkpoint(tmp_path / "a", one), write_checkpoint(tmp_path / "b", other)
    document = weightmill("diff", a, b, "format=json").document
    different = {row["name"]: row for row in document["tensors"] if row["status"] == "different"}
    assert set(different) == {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}
    step = values_of(other["model.norm.weight"])[3] - 1
    assert different["model.norm.weight"]["max_error"] == pytest.approx(step)
    assert different["model.layers.0.mlp.up_proj.weight"]["why"] == "shapes [128, 64] and [64, 128]"
    assert (document["only_in_a"], document["only_in_b"]) == (["lm_head.weight"], ["extra"])
    ran = weightmill("diff", a, b)
    said = ran.out
    assert ran.status == 1
    assert "20 tensors: 18 equal, 2 different" in said
    assert "only in" in said


def test_diff_of_a_checkpoint_with_itself_is_equal(source: Path, weightmill: Any) -> None:
    ran = weightmill("diff", source, source)
    assert ran.status == 0
    assert "21 tensors: 21 equal, 0 different" in ran.out
    assert "in all" not in ran.out


@pytest.mark.quick
def test_a_tensor_on_one_side_alone_is_a_difference(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors()
    more = {**tensors, "extra": tensors["model.norm.weight"]}
    a, b = write_checkpoint(tmp_path / "a", tensors), write_checkpoint(tmp_path / "b", more)
    for sides in ((a, b), (b, a)):
        ran = weightmill("diff", *sides, "format=json")
        assert ran.status == 1
        assert (ran.document["status"], ran.document["different"]) == ("different", 0)


@pytest.mark.quick
def test_diff_sorts_by_layer_and_sums_up(tmp_path: Path, weightmill: Any) -> None:
    norms = {f"model.layers.{n}.input_layernorm.weight": weights(np.full(8, n + 1.0), "F32") for n in (10, 2, 1)}
    changed = {**norms, "model.layers.10.input_layernorm.weight": weights(np.full(8, 12.0), "F32")}
    a, b = write_checkpoint(tmp_path / "a", norms), write_checkpoint(tmp_path / "b", changed)
    ran = weightmill("diff", a, b, "tensors=all", "format=json")
    layers = [int(row["name"].split(".")[2]) for row in ran.document["tensors"]]
    assert layers == [1, 2, 10]
    total = ran.document["total"]
    assert (total["parameters"], total["max_error"]) == (24, 1.0)
    # One weight in three is off by 1; the source's squares are those of 2, 3 and 11.
    assert total["relative_error"] == pytest.approx((1 / (4 + 9 + 121)) ** 0.5)
    assert "over all 24 weights: relative error 0.08639" in weightmill("diff", a, b).out


def test_diff_without_its_arguments_is_refused(source: Path, weightmill: Any) -> None:
    ran = weightmill("diff", source)
    assert ran.status == 2
    assert "b: missing (the second checkpoint); give b=..." in ran.err


def test_none_gives_back_an_equal_checkpoint(source: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=none").status == 0
    one, other = read_safetensors(source), read_safetensors(tmp_path / "out")
    assert {n: r.data.tobytes() for n, r in one.items()} == {n: r.data.tobytes() for n, r in other.items()}


def test_diff_and_a_job_agree_where_blocks_are_copied(tmp_path: Path, weightmill: Any) -> None:
    """What is copied in blocks counts by the weights that the blocks stand for."""
    model = make_source(tmp_path / "model")
    source, out = tmp_path / "q8_0", tmp_path / "q4_0"
    weightmill("run", f"model.path={model}", "quant=gguf_q8_0", f"output.path={source}")
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {action: keep, name: '(token_embd|attn_q|ffn_up)'}\n")
    ran = weightmill(
        "run", f"model.path={source}", "quant=gguf_q4_0", f"output.path={out}", f"rules={rules}", "format=json"
    )
    assert ran.status == 0, ran.err
    kept = [row for row in ran.document["tensors"] if row["action"] == "keep" and row["dtype"] == "Q8_0"]
    assert kept
    document = weightmill("diff", source, out, "format=json").document
    total = document["total"]
    assert total["relative_error"] == pytest.approx(ran.document["totals"]["relative_error"], rel=1e-3)
    # Two GGUFs are compared by their own names, as the job has named its worst tensors; others by transformers'.
    assert {row["name"] for row in document["tensors"]} <= {row["name"] for row in ran.document["tensors"]}
    assert {row["name"].split(".")[0] for row in document["tensors"]} == {"blk"}
    document = weightmill("diff", model, out, "format=json").document
    assert {row["name"].split(".")[0] for row in document["tensors"]} == {"model", "lm_head"}


def test_of_many_tensors_those_that_differ_most_are_shown(tmp_path: Path, weightmill: Any) -> None:
    values = np.arange(64).reshape(8, 8)
    one = {f"layers.{number}.weight": weights(values, "BF16") for number in range(60)}
    other = dict(one)
    for number in range(50):
        data = one[f"layers.{number}.weight"].data.copy()
        data[0, : 1 + number // 7] ^= 1
        other[f"layers.{number}.weight"] = Raw("BF16", data)
    a, b = write_checkpoint(tmp_path / "a", one), write_checkpoint(tmp_path / "b", other)
    said = weightmill("diff", a, b).out
    assert "the 40 that differ most, in the model's order; tensors=all lists every tensor" in said
    assert "60 tensors: 10 equal, 50 different" in said
    assert len(weightmill("diff", a, b, "format=json").document["tensors"]) == 50
    assert "differ most" not in weightmill("diff", a, b, "tensors=all").out


def test_what_is_quantized_differs_as_a_job_has_measured_and_not_from_what_it_is_decoded_to(
    tmp_path: Path, weightmill: Any
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    ran = weightmill("run", "quant=int8", f"output.path={out}", "format=json")
    total = weightmill("diff", DEMO, out, "format=json").document["total"]
    assert total["relative_error"] == pytest.approx(ran.document["totals"]["relative_error"], rel=1e-6)
    assert (
        weightmill("run", f"model.path={out}", "quant=none", "quant.dtype=bfloat16", f"output.path={plain}").status == 0
    )
    for pair in ((out, plain), (plain, out)):
        assert weightmill("diff", *pair).status == 0
