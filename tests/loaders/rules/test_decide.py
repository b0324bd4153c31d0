"""Rules: the first that matches decides, the engine's come last, and a rule that does nothing is an error."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec
from loaders.quantization.schemes.bitnet import Ternary
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedNvfp4
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.quantization.schemes.plain import Plain
from loaders.rules.decide import decide
from loaders.rules.kept import cast_kept
from loaders.rules.refusals import RAGGED, ragged_notes
from loaders.rules.rule import Decision, Rule
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.sources import tensors_of
from loaders.words import size
from tests.making import LLAMA, llama_tensors, write_checkpoint

pytestmark = pytest.mark.quick


@pytest.fixture
def tensors_in(tmp_path: Path) -> tuple[LogicalTensor, ...]:
    return tensors_of(open_checkpoint(write_checkpoint(tmp_path / "m")), decode=False).tensors


def actions(decisions: tuple[Decision, ...]) -> dict[str, str]:
    return {decision.tensor.name: decision.action for decision in decisions}


def own(action: str, **conditions: object) -> Rule:
    return Rule(action=action, why="test", label="rules[0]", **conditions)  # type: ignore[arg-type]


def test_bitsandbytes_quantizes_linear_layers_and_nothing_else(tensors_in: tuple[LogicalTensor, ...]) -> None:
    found = actions(decide(tensors_in, Bnb4("nf4"), ()))
    quantized = {name for name, action in found.items() if action == "quantize"}
    assert quantized == {name for name in llama_tensors() if "_proj" in name}


def test_the_first_matching_rule_decides(tensors_in: tuple[LogicalTensor, ...]) -> None:
    rules = (own("keep", name="layers.0.*down_proj"), own("cast", name="down_proj", cast_to="F16"))
    found = actions(decide(tensors_in, Bnb4("nf4"), rules))
    assert found["model.layers.0.mlp.down_proj.weight"] == "keep"
    assert found["model.layers.1.mlp.down_proj.weight"] == "cast"


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"role": ("norm",)}, 5),
        ({"shape": (128, None)}, 4),
        ({"shape": (None,)}, 5),
        ({"dtype": ("BF16",)}, 21),
        ({"role": ("attention",), "shape": (64, 64)}, 4),
    ],
)
def test_rules_match_by_role_shape_and_dtype(
    tensors_in: tuple[LogicalTensor, ...], conditions: dict[str, object], expected: int
) -> None:
    assert sum(own("keep", **conditions).matches(tensor) for tensor in tensors_in) == expected


def test_a_rule_that_matches_nothing_is_an_error_with_a_hint(tensors_in: tuple[LogicalTensor, ...]) -> None:
    with pytest.raises(BadSpec, match=r"rules\[0\]: it matches no tensor \(name ~ dwn_proj\); the checkpoint's names"):
        decide(tensors_in, Bnb4("nf4"), (own("keep", name="dwn_proj"),))


def test_a_rule_behind_one_that_takes_all_is_an_error(tensors_in: tuple[LogicalTensor, ...]) -> None:
    rules = (own("keep", name="proj"), Rule(action="keep", why="test", name="down_proj", label="rules[1]"))
    with pytest.raises(BadSpec, match=r"rules\[1\]: what it matches \(.*: 2 tensors\) is all taken by rules before it"):
        decide(tensors_in, Bnb4("nf4"), rules)


def test_all_faults_are_told_at_once(tensors_in: tuple[LogicalTensor, ...]) -> None:
    rules = (own("quantize", role=("norm",)), Rule(action="keep", why="test", name="ghost", label="rules[1]"))
    with pytest.raises(BadSpec) as caught:
        decide(tensors_in, Ternary(), rules)
    assert len(caught.value.problems) == 2
    assert "rules[0]: cannot quantize 5 tensors (model.layers.0.post_attention_layernorm.weight" in str(caught.value)
    said = "leave them out, or let a job keep them by rules='[{action: keep, name: "
    assert f" first): their shape is [64]; ternary takes matrices; {said}" in str(caught.value)


def test_rows_that_do_not_divide_are_refused_by_ternary_before_the_work(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["model.layers.0.self_attn.k_proj.weight"] = type(tensors["lm_head.weight"])(
        "BF16", tensors["lm_head.weight"].data[:30]
    )
    root = write_checkpoint(tmp_path / "m", tensors, config={**LLAMA, "dtype": "bfloat16"})
    with pytest.raises(BadSpec, match="k_proj.weight: its 30 rows are no multiple of 4"):
        decide(tensors_of(open_checkpoint(root), decode=False).tensors, Ternary(), ())


def ragged(tensors_in: tuple[LogicalTensor, ...], columns: int) -> tuple[LogicalTensor, ...]:
    """Add a matrix with `columns` columns, of a hundredth of the others' weights or less."""
    one = next(tensor for tensor in tensors_in if tensor.name.endswith("q_proj.weight"))
    return (*tensors_in, replace(one, name="vision.proj.weight", role="linear", shape=(4, columns)))


def test_a_few_ragged_rows_stay_plain(tensors_in: tuple[LogicalTensor, ...]) -> None:
    decisions = decide(ragged(tensors_in, 24), CompressedNvfp4(), ())
    assert [d.tensor.name for d in decisions if d.rule.why == RAGGED] == ["vision.proj.weight"]
    [said] = ragged_notes(decisions)
    assert "1 matrix stays bfloat16, vision.proj.weight: rows of 24 do not divide into groups" in said


def test_many_ragged_rows_are_refused_in_one_line_with_a_rule_that_keeps_them(
    tensors_in: tuple[LogicalTensor, ...],
) -> None:
    scheme = PackedInt(4, 128, True)  # of the 64 columns of most matrices
    with pytest.raises(BadSpec) as caught:
        decide(tensors_in, scheme, ())
    [problem] = caught.value.problems
    assert "cannot quantize 12 tensors" in problem
    [pattern] = re.findall(r'rules=.*name: "(.*)"', problem)
    kept = Rule(action="keep", why="as told", name=pattern, label="rules[0]")
    assert actions(decide(tensors_in, scheme, (kept,)))["model.layers.1.mlp.down_proj.weight"] == "quantize"


def test_a_ragged_matrix_that_a_rule_names_is_refused(tensors_in: tuple[LogicalTensor, ...]) -> None:
    rule = Rule(action="quantize", why="as told", name="^vision", label="rules[0]")
    with pytest.raises(BadSpec, match=r"rules\[0\]: cannot quantize vision.proj.weight: its 24 columns"):
        decide(ragged(tensors_in, 24), CompressedNvfp4(), (rule,))


def test_ragged_rows_of_several_lengths_are_one_cause(tensors_in: tuple[LogicalTensor, ...]) -> None:
    one = next(tensor for tensor in tensors_in if tensor.name.endswith("q_proj.weight"))
    longer = replace(one, name="model.layers.0.self_attn.kv_proj.weight", shape=(64, 192))
    with pytest.raises(BadSpec) as caught:
        decide((*tensors_in, longer), PackedInt(4, 128, True), ())
    [problem] = caught.value.problems
    assert "cannot quantize 13 tensors (" in problem
    assert "their 64 and 192 columns do not divide into groups of 128; group_size=64 fits all;" in problem


def test_none_copies_and_casts(tensors_in: tuple[LogicalTensor, ...]) -> None:
    assert set(actions(decide(tensors_in, Plain(), ())).values()) == {"keep"}
    assert set(actions(decide(tensors_in, Plain("F32"), ())).values()) == {"cast"}


def test_a_refusal_of_ragged_rows_names_the_groups_that_fit_and_what_keeping_costs(
    tensors_in: tuple[LogicalTensor, ...],
) -> None:
    with pytest.raises(BadSpec) as caught:
        decide(tensors_in, PackedInt(4, 128, True), ())
    said = str(caught.value)
    remedy = "leave them out, or let a job keep them by rules="
    assert f"64 columns do not divide into groups of 128; group_size=64 fits all; {remedy}" in said
    [pattern] = re.findall(r'rules=.*name: "(.*)"', said)
    kept = decide(tensors_in, PackedInt(4, 128, True), (own("keep", name=pattern),))
    output = size(sum(part.size for d in kept if d.encoding is not None for part in d.encoding.stored.values()))
    source = size(sum(tensor.source_bytes for tensor in tensors_in))
    assert said.endswith(f" stay plain; the output has about {output}, the source {source})")
    with pytest.raises(BadSpec) as caught:
        decide(tensors_in, PackedInt(4, 128, True), (), kept_dtype=DTYPES["F32"])
    kept = cast_kept(kept, DTYPES["F32"])
    wider = size(sum(part.size for d in kept if d.encoding is not None for part in d.encoding.stored.values()))
    assert output != wider
    assert f"the output has about {wider}, " in str(caught.value)


def test_a_rule_for_a_role_that_no_tensor_has_is_told_the_roles(tensors_in: tuple[LogicalTensor, ...]) -> None:
    with pytest.raises(
        BadSpec, match=r"no tensor \(role expert\); the roles of this checkpoint's tensors are attention"
    ):
        decide(tensors_in, Bnb4("nf4"), (own("keep", role=("expert",)),))
