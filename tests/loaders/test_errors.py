"""Errors have the fields that their texts have."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from loaders import BadCheckpoint, BadSpec, Problem, StorageError, WeightmillError, load_weights, preset
from loaders.errors import io_errors, setting, settings_called

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("text", "where", "expected", "found", "hint"),
    [
        ('unit_mb: expected a number; found "many"', "unit_mb", "a number", "many", None),
        ("a: expected yes or no; write a=yes; found 3", "a", "yes or no", "3", "write a=yes"),
        ("dtype: expected float32 or float16, found int4", "dtype", "float32 or float16", "int4", None),
        ("a.safetensors: 'b; c': 3 bytes; fetch it again", "a.safetensors", None, None, "fetch it again"),
        ("making /a b/c: Permission denied; check who owns it", "/a b/c", None, None, "check who owns it"),
        ('role: expected head or layer; did you mean "head"?; found "he\\"d"', "role", "head or layer", 'he"d',
         'did you mean "head"?'),
        ("a: expected b, found 'c' in 'd'", "a", "b", "'c' in 'd'", None),
        ("unit_mb: expected a number, found 48", "unit_mb", "a number", "48", None),
        ("quant: unknown choice 'nf5'; did you mean 'nf4'?", "quant", None, "nf5", "did you mean 'nf4'?"),
        ("strategy: unknown 'lasy'; known: a, b", "strategy", None, "lasy", "known: a, b"),
        ("modle: unknown key; did you mean 'model'?", "modle", None, "modle", "did you mean 'model'?"),
        ("quant=none model=x: quant.bits: unknown key (known: a; b)", "quant=none model=x", None, "quant.bits", None),
        ("not published: a.weight: relative error 0.0933, at most 0.01 allowed (the worst of 21)", "a.weight",
         "at most 0.01", "0.0933", None),
        ("not published: KL of the logits is 3.1e-05 (95 %: 1e-05 to 4e-05), above verify.max_kl=1e-05. Its files are",
         "verify.max_kl", "at most 1e-05", "3.1e-05", None),
        ("not published: the cosine of hidden states is 0.91, below verify.min_cosine=0.99; the rest",
         "verify.min_cosine", "at least 0.99", "0.91", "the rest"),
        ("rules: model's head; do", "rules", None, None, "do"),
        ("a plain sentence: with words before", None, None, None, None),
    ],
)  # fmt: skip
def test_a_text_is_taken_apart(
    text: str, where: str | None, expected: str | None, found: str | None, hint: str | None
) -> None:
    problem = Problem.of(text)
    assert (problem.where, problem.expected, problem.found, problem.hint) == (where, expected, found, hint)
    assert problem.what in text


def test_errors_that_are_raised_have_them(tmp_path: Path) -> None:
    with pytest.raises(BadSpec) as refused:
        load_weights(tmp_path, dtype="int4", strategy="lasy")
    assert refused.value.where == "dtype"
    with pytest.raises(BadSpec) as refused:
        preset("nf4", group_size="x", bits=3)
    assert [each.where for each in refused.value.details] == ["quantize"] * 2
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BadCheckpoint) as damaged:
        load_weights(tmp_path)
    assert damaged.value.where == "model.safetensors"
    assert damaged.value.hint == "not safetensors, or truncated: fetch it again"
    with pytest.raises(StorageError) as failed, io_errors("reading", tmp_path / "nothing"):
        (tmp_path / "nothing").read_bytes()
    assert (failed.value.where, failed.value.hint) == (str(tmp_path / "nothing"), "it is not there (any more)")


def test_several_problems_are_told_apart_also_by_another_process() -> None:
    error = pickle.loads(pickle.dumps(BadSpec(["a: wrong", "b: expected 1, found 2"], "leave both out")))
    assert [each.where for each in error.details] == ["a", "b"]
    assert error.details[1].found == "2"
    assert error.hint == "leave both out"
    assert WeightmillError("").where is None


def test_words_of_several_programs_at_once_do_not_stay() -> None:
    one, other = settings_called({"output": "output.path"}), settings_called({"output": "out"})
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert setting("output") == "out"
    other.__exit__(None, None, None)
    assert setting("output") == "output"
