"""docs/tested.md's table of model types by engines: it has every layout, and a few are judged again.

The whole judge takes minutes (`python -m tests.judge`), and is no part of the suite.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.header_checkpoints import compress, entries, expand, make, tensors_of, with_few_experts
from tests.judge import ENGINES, QUANTS, Notes, Verdict, cell, judge, reason, table, type_of
from tests.readme import table_of

# Layouts that are the only ones of their types, one right, one with a tied head, one an encoder, one a small mixture.
AGAIN = ("olmo-2-7b", "smollm3-3b", "gte-small", "olmoe-1b-7b")
NUMBER = re.compile(r" \(\d+\)")


def cells_of(text: str) -> dict[str, list[str]]:
    """Return a table's cells by model type."""
    rows = [[part.strip() for part in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {each.strip("`"): cells for types, *cells in rows[2:] for each in re.findall(r"`[^`]+`|^no \w+$", types)}


@pytest.mark.quick
def test_the_table_has_every_layout() -> None:
    shown = table_of("engines")
    assert set(cells_of(shown)) == {type_of(name) for name in entries()}


@pytest.mark.engine
@pytest.mark.parametrize("name", AGAIN)
def test_what_is_judged_again_is_what_the_table_says(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert [each for each in entries() if type_of(each) == type_of(name)] == [name]
    found = judge(name, QUANTS, tmp_path)
    notes = Notes()
    cells = [NUMBER.sub("", cell({name: found}, quants, notes)) for quants in ENGINES.values()]
    assert [NUMBER.sub("", text) for text in cells_of(table_of("engines"))[type_of(name)]] == cells


@pytest.mark.quick
def test_types_of_which_the_same_is_true_share_a_row() -> None:
    right, refused = Verdict("right"), Verdict("refused", ("nobody knows it",))
    few = Verdict("right", share=0.5, stays="too dear")
    shown = table(
        {
            "olmo-2-7b": dict.fromkeys(QUANTS, right),
            "phi-2": dict.fromkeys(QUANTS, right) | {"gguf_q4_k_m": refused, "w4a16": few},
            "gpt2": dict.fromkeys(QUANTS, right),
        }
    )
    assert cells_of(shown) == {
        "gpt2": ["right"] * 4,
        "olmo2": ["right"] * 4,
        "phi": [
            "right",
            "right in `fp8_dynamic`, `nvfp4a16`; right, 50% of the recipe (1) in `w4a16`",
            "right",
            "refused (2)",
        ],
    }
    assert shown.splitlines()[-1] == "(1) what stays most: too dear; (2) nobody knows it."


@pytest.mark.quick
def test_every_share_of_a_recipe_in_the_table_has_a_reason() -> None:
    shown = table_of("engines")
    assert re.findall(r"% of the recipe(?! \(\d+\))", shown) == []
    assert all(f"({number}) what stays most: " in shown for number in re.findall(r"% of the recipe \((\d+)\)", shown))


@pytest.mark.quick
def test_a_layout_becomes_a_checkpoint_without_weights(tmp_path: Path) -> None:
    from loaders.checkpoints.checkpoint import open_checkpoint

    entry = entries()["qwen3-30b-a3b"]
    assert compress(tensors_of(entry))[:3] == entry["tensors"][:3]
    few = with_few_experts(entry, 4)
    assert few["config"]["num_experts"] == 4
    make(few, tmp_path / "made")
    checkpoint = open_checkpoint(tmp_path / "made")
    found = {spec.name: (spec.dtype.name, spec.shape) for spec in checkpoint.weights}
    assert found == tensors_of(few)
    assert sum(".experts." in name for name in found) == 48 * 4 * 3
    assert sum(path.stat().st_blocks for path in (tmp_path / "made").iterdir()) * 512 < 8 << 20


@pytest.mark.quick
def test_patterns_stand_for_names() -> None:
    assert list(expand("a.{0-1,3}.b")) == ["a.0.b", "a.1.b", "a.3.b"]
    names = {f"a.{i}.b.{j}": ("F32", (2,)) for i in range(3) for j in (0, 2)}
    assert compress(names) == [["a.{0-2}.b.{0,2}", "F32", [2]]]


@pytest.mark.quick
def test_a_layout_is_named_where_others_of_its_type_are_not_as_it_is() -> None:
    right, refused, wrong = Verdict("right"), Verdict("refused", ("ragged",)), Verdict("wrong", ("a name is missing",))
    quants, notes = ("fp8_dynamic", "w4a16"), Notes()
    found = {name: dict.fromkeys(quants, right) for name in ("one", "two", "three")}
    found["two"] = {**found["two"], "w4a16": refused}
    assert cell(found, quants, notes) == "right; refused (1) in `w4a16` for two"
    assert cell({"one": dict.fromkeys(quants, wrong)}, quants, notes) == "wrong (2)"
    assert notes.lines() == "(1) ragged; (2) a name is missing."


@pytest.mark.quick
def test_a_reason_is_whole_and_the_same_for_other_models() -> None:
    text = "quant: cannot quantize 3 tensors (model.layers.0.fc2.weight first): their 4 and 64 columns are odd; keep"
    assert reason(text, Path("/x")) == "cannot quantize some tensors: the columns are odd"
    text = "model.path: this is mlx-lm's checkpoint of model_type 'abc', and how it renames that model's tensors is odd"
    said = "this is mlx-lm's checkpoint of model_type …, and how it renames that model's tensors is odd"
    assert reason(text, Path("/x")) == said
