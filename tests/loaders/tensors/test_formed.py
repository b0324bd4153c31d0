"""Forms of tensors: numbers of config.json that weights are multiplied by, and rows that are left out or cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loaders.architectures.family_files import known_types, section
from loaders.architectures.forms import forms_of
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec
from loaders.tensors.form_values import FACTORS, VALUES, minus_exp
from loaders.tensors.form_views import VIEWS
from loaders.tensors.formed import FormedTensor, Forms
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.views import FormedView

pytestmark = pytest.mark.quick

TIMES = forms_of([{"name": r"q\.weight$", "times": ["scale", "scales.1"]}])


class Numbers:
    def __init__(self, tensor: LogicalTensor, numbers: np.ndarray) -> None:
        self.spec = tensor.spec
        self._numbers = numbers

    def read(self, start: int, stop: int, slot: int = 0) -> np.ndarray:
        return self._numbers[start:stop]


def tensor(*shape: int, name: str = "q.weight") -> LogicalTensor:
    return LogicalTensor(name=name, shape=shape, dtype=DTYPES["F32"], stored=(), window=None, decode=None)


def test_weights_are_multiplied_by_one_number_after_the_other() -> None:
    [made] = Forms(TIMES, {"scale": 0.7, "scales": [9.0, 1.5]}).of(tensor(2, 3))
    numbers = np.arange(6, dtype=np.float32) / 7
    found = FormedView(Numbers(made, numbers), made).read(0, 6)
    np.testing.assert_array_equal(found, numbers * np.float32(0.7) * np.float32(1.5))


def test_the_words_of_several_rows_count_in_their_order() -> None:
    rows = [
        {"values": "plus_one"},
        {"values": "scaled", "by": ["scale"]},
        {"times": ["scale"]},
        {"values": "minus_exp"},
    ]
    [made] = Forms(forms_of([{"name": "q", **row} for row in rows]), {"scale": 0.7}).of(tensor(2, 3))
    numbers = np.arange(6, dtype=np.float32) / 7
    found = FormedView(Numbers(made, numbers), made).read(0, 6)
    np.testing.assert_array_equal(found, minus_exp((numbers + np.float32(1)) * np.float32(0.7) * np.float32(0.7)))


def test_the_last_word_of_a_row_before_is_undone() -> None:
    rows = [{"name": "q", "values": word} for word in ("minus_exp", "plus_one", "minus_one")]
    [made] = Forms(forms_of(rows), {}).of(tensor(2, 3))
    assert isinstance(made, FormedTensor)
    assert [change.word for change in made.changes] == ["minus_exp"]


@pytest.mark.parametrize("engine", ["mlx", "gguf"])
def test_every_word_of_a_family_is_a_function(engine: str) -> None:
    sections = [section(model_type, engine) or {} for model_type in known_types(engine)]
    rows = [row for each in sections for row in each.get("forms", ())]
    assert {row["view"] for row in rows if "view" in row} <= VIEWS.keys()
    assert {row["values"] for row in rows if "values" in row} <= VALUES.keys() | FACTORS.keys()


def test_a_tensor_that_is_multiplied_by_one_stays_as_it_is() -> None:
    one = tensor(2, 3)
    assert list(Forms(TIMES, {"scale": 1, "scales": [2.0, 1.0]}).of(one)) == [one]
    assert list(Forms(TIMES, {}).of(one)) == [one]


@pytest.mark.parametrize("wrong", ["0.7", True, float("nan"), 1e40, [2.0]])
def test_what_is_no_number_is_refused(wrong: Any) -> None:
    with pytest.raises(BadSpec, match="expected a number as scale"):
        list(Forms(TIMES, {"scale": wrong}).of(tensor(2, 3)))


def test_positions_begin_after_that_of_the_padding() -> None:
    rows = forms_of([{"name": "position", "view": "after_padding"}])
    one = tensor(6, 4, name="position")
    [made] = Forms(rows, {"pad_token_id": 1}).of(one)
    assert made.shape == (4, 4)
    assert made.window is not None
    assert made.window.offset == 2 * 4
    [whole] = Forms(rows, {"pad_token_id": None}).of(one)
    assert whole.shape == (6, 4)
    with pytest.raises(BadCheckpoint, match="more than 6 positions"):
        list(Forms(rows, {"pad_token_id": 5}).of(one))


def test_what_enters_a_state_space_is_cut_by_its_parts() -> None:
    names = ["gate", "input", "b", "c", "step"]
    rows = forms_of([{"name": "in$", "view": "state_parts", "to": names}])
    config = {"hidden_size": 4, "mamba_d_ssm": 8, "mamba_n_groups": 2, "mamba_d_state": 3}
    found = {each.name: each.shape for each in Forms(rows, config).of(tensor(30, 4, name="in"))}
    assert found == {"gate": (8, 4), "input": (8, 4), "b": (6, 4), "c": (6, 4), "step": (2, 4)}
    with pytest.raises(BadCheckpoint, match="more than 28 rows"):
        list(Forms(rows, config).of(tensor(28, 4, name="in")))
