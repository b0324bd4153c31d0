"""Whatever form a source has, each engine's output is that of its plain form, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import passes
from tests.readme import table_of
from tests.sources import SOURCES, TARGETS, base, table

FORMS = {form: (row, build) for row, forms in SOURCES.items() for form, build in forms.items()}
FIRST = {next(iter(forms)) for forms in SOURCES.values()}
GROUPS = (("gguf_q8_0",), ("mlx_int4", "w8a8", "hqq4"), ("nf4", "ternary"))  # what can be written in one pass


@pytest.mark.parametrize("form", FORMS)
def test_a_source_gives_each_engine_what_its_plain_form_gives(form: str, tmp_path: Path) -> None:
    """The first form of a row goes to all engines, others to one: they make the same of the same weights."""
    row, build = FORMS[form]
    source = build(tmp_path)
    plain = passes.run(source, tmp_path / "plain", "none", settings=("quant.dtype=bfloat16",))["none"].folder
    presets = [*TARGETS.values()] if form in FIRST else ["nf4"]
    if row == "GGUF":  # see the next test
        presets = [preset for preset in presets if preset != "gguf_q8_0"]
    for group in GROUPS:
        wanted = [preset for preset in group if preset in presets]
        if not wanted:
            continue
        ours, theirs = (passes.run(s, tmp_path / n, *wanted) for s, n in ((source, "one"), (plain, "two")))
        for preset in wanted:
            assert ours[preset].weights == theirs[preset].weights, preset
            assert ours[preset].config == theirs[preset].config, preset


def test_a_gguf_gives_the_gguf_that_its_source_gives(tmp_path: Path) -> None:
    source = SOURCES["GGUF"]["gguf"](tmp_path)
    ours, theirs = (passes.run(s, tmp_path / n, "gguf_q8_0") for s, n in ((source, "1"), (tmp_path / "base", "2")))
    found, wanted = ours["gguf_q8_0"].tensors, theirs["gguf_q8_0"].tensors
    assert found == wanted
    assert found["blk.0.attn_q.weight"][0] == "Q8_0"


def test_nf4_of_bf16_of_nf4_is_the_same_nf4(tmp_path: Path) -> None:
    first = passes.run(base(tmp_path), tmp_path / "a", "nf4")["nf4"]
    plain = passes.run(first.folder, tmp_path / "b", "none", settings=("quant.dtype=bfloat16",))["none"]
    assert passes.run(plain.folder, tmp_path / "c", "nf4")["nf4"].weights == first.weights


def test_the_readmes_table_is_this_one() -> None:
    assert table_of("sources") == table(), "python -m tests.readme writes it"
