"""Tables fit what they are printed on: numbers whole, names short, columns by their importance."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import RenderableType

from jobs.cli.console import ALL_COLUMNS, console
from jobs.report.tables import Table, common_ends, table

pytestmark = pytest.mark.quick

NUMBERS = ("bits per weight", "relative error", "SQNR dB", "seconds", "megabytes", "kilobytes")
WIDTHS = (30, 40, 60, 80, 120, 200)


def printed(what: RenderableType, width: int, monkeypatch: pytest.MonkeyPatch, every: bool | None = None) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    token = ALL_COLUMNS.set(every)
    stream = io.StringIO()
    try:
        console(stream).print(what, crop=False)
    finally:
        ALL_COLUMNS.reset(token)
    assert all(len(line) <= width for line in stream.getvalue().splitlines())
    return stream.getvalue()


def tensors(**options: Any) -> Table:
    made = table("tensor", *NUMBERS, "kind", right=NUMBERS, **options)
    for layer in (1, 22):
        for name in ("mlp.down_proj", "self_attn.q_proj"):
            row = [f"{layer * 1000 + at:,}.{at}25" for at in range(len(NUMBERS))]
            made.add_row(f"model.layers.{layer}.{name}.weight", *row, "BF16")
    return made


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("options", [{}, {"names": ("tensor",)}, {"names": ("tensor",), "once": True}])
def test_no_number_is_cut_at_any_width(options: Any, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said = printed(tensors(**options), width, monkeypatch)
    whole = {cell for row in tensors().rows for cell in map(str, row[1:])}
    assert set(re.findall(r"\d[\d,]*\.\d+", said)) <= whole
    assert "1,000.025" in said  # the first column of numbers is there at any width


def test_a_wider_terminal_has_more_columns_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [printed(tensors(names=("tensor",)), width, monkeypatch, every=False) for width in WIDTHS]
    counts = [text.count(".") for text in said]
    assert counts == sorted(counts)
    assert "for more columns (" in said[2]
    assert "columns=all" in said[2].replace("\n", " ")
    assert "for more" not in said[-1]


def test_all_columns_follow_below_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    said = printed(tensors(names=("tensor",)), 60, monkeypatch, every=True)
    for row in tensors().rows:
        assert all(str(cell) in said for cell in row[1:])
    assert said.count("22.self_attn.q_proj") > 1  # each part begins with the names
    assert "for more" not in said


def test_names_lose_what_all_have_only_where_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = (printed(tensors(names=("tensor",)), width, monkeypatch) for width in (60, 200))
    assert "tensor: model.layers. ... .weight" in narrow
    assert "model.layers.1.mlp" not in narrow
    assert "model.layers.1.mlp.down_proj.weight" in wide


def test_what_is_the_same_in_all_rows_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said = printed(tensors(once=True), 200, monkeypatch)
    assert said.count("BF16") == 1
    assert "in all rows: kind BF16" in said


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["demo-nf4", "demo-nf4-g64"], ("demo-", "")),
        (["model.a.weight", "model.b.weight"], ("model.", ".weight")),
        (["a", "b"], ("", "")),
        (["nf4", "nf5"], ("", "")),
        (["x-1-x", "x-1-x"], ("x-1-", "")),
        (["only"], ("", "")),
        (["a.b", "a."], ("", "")),
        (["demo-gguf_q4_0", "demo-gguf_q8_0"], ("demo-", "")),
    ],
)
def test_ends_of_names_are_whole_parts_and_leave_something(names: list[str], ends: tuple[str, str]) -> None:
    assert common_ends(names) == ends


def test_a_long_name_is_folded_between_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = table("name", "bytes", right=("bytes",))
    made.add_row("a_name/of.many-parts/that-is-longer/than-the-terminal", "1,234,567")
    lines = [line.split() for line in printed(made, 30, monkeypatch).splitlines()[1:]]
    assert "".join(line[0] for line in lines) == "a_name/of.many-parts/that-is-longer/than-the-terminal"
    assert lines[0][1] == "1,234,567"
    assert all(line[0][-1] in "-./_" for line in lines[:-1])


def test_sentences_take_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made = table("action", "bytes", "why", right=("bytes",), prose=("why",))
    why = "a sentence that is longer than what a terminal of eighty columns has left beside these two columns"
    made.add_row("keep", "1,234,567", why)
    said = printed(made, 80, monkeypatch)
    assert " ".join(word for word in said.split() if word in why.split()) == why
    assert len(said.splitlines()) == 3
