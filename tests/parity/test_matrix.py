"""The matrix of presets and kinds of models is complete, and every cell points at a test that shows it."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from loaders.places import ROOT
from tests.parity.matrix import KINDS, MATRIX, Cell, table
from tests.readme import table_of

CELLS = [(preset, kind, cell) for preset, cells in MATRIX.items() for kind, cell in zip(KINDS, cells, strict=True)]


@pytest.mark.quick
def test_every_preset_is_in_it() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "quant").glob("*.yaml")} - {"auto"}  # a mix of the others
    assert sorted(MATRIX) == sorted(presets), "MATRIX of tests/parity/matrix.py"


def test_a_reason_stands_where_nothing_is_judged() -> None:
    assert [(preset, kind) for preset, kind, cell in CELLS if (cell.verdict == "judged") == bool(cell.why)] == []


@pytest.mark.parametrize(("preset", "kind", "cell"), CELLS, ids=[f"{preset}-{kind}" for preset, kind, _ in CELLS])
def test_a_cell_is_shown_by_a_test(preset: str, kind: str, cell: Cell) -> None:
    module, name = cell.test.split("::")
    tests = importlib.import_module(f"tests.parity.{module}")
    function = getattr(tests, name)
    for parameter, value in cell.case.items():
        assert value in values_of(function, parameter), f"{cell.test} has no {parameter}={value}"
    if len(cell.case) > 1:
        assert tuple(cell.case.values()) in cases_of(function, tuple(cell.case)), f"{cell.test} has no {cell.case}"
    asked = preset_of(module, name, tests, cell.case)
    assert asked == preset, f"{cell.test} with {cell.case} is about {asked}"
    assert kind_of(cell) == kind, f"{cell.test} with {cell.case} is about a model that is {kind_of(cell)}"


def marks_of(function: Any) -> list[Any]:
    return [mark for mark in function.pytestmark if mark.name == "parametrize"]


def names_of(mark: Any) -> tuple[str, ...]:
    given = mark.args[0]
    return tuple(given.replace(" ", "").split(",")) if isinstance(given, str) else tuple(given)


def rows_of(mark: Any) -> list[Any]:
    """What the parameters of a mark take together; pytest.param has them as `values`."""
    plain = [row.values if isinstance(row, type(pytest.param())) else row for row in mark.args[1]]
    return plain if len(names_of(mark)) > 1 else [row if isinstance(row, tuple) else (row,) for row in plain]


def values_of(function: Any, parameter: str) -> list[Any]:
    """All that a test's parameter takes."""
    for mark in marks_of(function):
        names = names_of(mark)
        if parameter in names:
            return [row[names.index(parameter)] for row in rows_of(mark)]
    return []


def cases_of(function: Any, parameters: tuple[str, ...]) -> set[tuple[Any, ...]]:
    """The values that parameters take together."""
    for mark in marks_of(function):
        names = names_of(mark)
        if set(parameters) <= set(names):
            return {tuple(row[names.index(parameter)] for parameter in parameters) for row in rows_of(mark)}
    return set()


def preset_of(module: str, name: str, tests: Any, case: Any) -> str | None:
    """The preset that a test with these parameters runs."""
    if "preset" in case:
        return str(case["preset"])
    if "file_type" in case:
        return f"gguf_{case['file_type'].lower()}"
    if module == "test_bitsandbytes":
        return str(tests.CASES[case["case"]][2])
    if module == "test_hqq":
        return str(tests.CASES[case["case"]][3])
    if module == "test_mlx":
        return next(
            (str(a).removeprefix("quant=") for a in tests.CASES[case["case"]][2] if a.startswith("quant=")), None
        )
    return {"test_bitnet": "ternary", "test_plain": "none", "test_llama_cpp": "ternary_aggressive"}.get(module)


def kind_of(cell: Cell) -> str:
    """The kind of model, by the words of its case; a test of odd sizes or of a mixture alone says so by its name."""
    words = " ".join((*cell.case.values(), cell.test.split("::")[1]))
    if re.search(r"moe|mixtral|mixture", words):
        return "mixture"
    if re.search(r"odd|cannot_hold", words):
        return "odd sizes"
    return "tied" if re.search(r"\btied", words) else "untied"


def test_the_readmes_table_is_this_one() -> None:
    assert table_of("matrix") == table(), "python -m tests.readme writes it"
