"""The words of messages: plural forms, sizes, types of models."""

from __future__ import annotations

import pytest

from loaders.words import counted, model_type_said, size

pytestmark = pytest.mark.quick


def test_what_is_counted_has_its_plural() -> None:
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert counted(1, "matrix stays", "matrices stay") == "1 matrix stays"
    assert counted(3, "matrix stays", "matrices stay") == "3 matrices stay"


def test_bytes_are_said_in_the_unit_that_fits() -> None:
    assert [size(n) for n in (999, 1_234_567, 2e12)] == ["999 B", "1.23 MB", "2.00 TB"]


def test_a_model_without_a_type_is_called_so() -> None:
    assert model_type_said({"model_type": "llama"}) == "model_type 'llama'"
    assert model_type_said({"model_type": None}) == model_type_said({}) == "a model without model_type"
