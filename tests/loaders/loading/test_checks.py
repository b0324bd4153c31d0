"""Shapes that were expected, and tensors that are shared."""

from __future__ import annotations

import numpy as np
import pytest

from loaders import BadCheckpoint, WeightSpec, filter_shared_tensors, validate_weight_shapes
from loaders.dtypes import DTYPES

torch = pytest.importorskip("torch")


def spec(name: str, *shape: int, offset: int = 0) -> WeightSpec:
    dtype = DTYPES["BF16"]
    return WeightSpec(
        name=name, dtype=dtype, shape=shape, file="model.safetensors", offset=offset, size=dtype.size(shape)
    )


def test_a_spec_is_hashable_and_counts() -> None:
    assert len({spec("a", 2, 3), spec("a", 2, 3), spec("b", 2, 3)}) == 2
    assert spec("a", 2, 3).numel() == 6


@pytest.mark.quick
def test_every_difference_of_shapes_is_listed() -> None:
    specs = {"a": spec("a", 2, 3), "b": spec("b", 4), "d": spec("d", 1)}
    validate_weight_shapes(specs, {"a": (2, 3), "b": torch.empty(4), "d": [1]})
    with pytest.raises(BadCheckpoint) as caught:
        validate_weight_shapes(specs.values(), {"a": (3, 2), "b": (4,), "c": (7,)})
    assert str(caught.value).splitlines() == [
        "3 weights are not as expected:",
        "a: expected [3, 2], found [2, 3]",
        "c: missing, expected [7]",
        "d: not expected, found [1]",
    ]


def test_shared_tensors_are_kept_once() -> None:
    table, other = torch.ones(4, 2), torch.ones(4, 2)
    kept, same = filter_shared_tensors(
        {"embed": table, "head": table, "copy": other, "part": table[:2], "turned": table.t(), "none": torch.empty(0)}
    )
    assert list(kept) == ["embed", "copy", "part", "turned", "none"]
    assert same == {"head": "embed"}
    array = np.ones((3, 3), np.float32)
    assert filter_shared_tensors({"a": array, "b": array, "c": array.copy()})[1] == {"b": "a"}
    specs = {"a": spec("a", 2), "b": spec("b", 2), "c": spec("c", 2, offset=4)}
    assert filter_shared_tensors(specs)[1] == {"b": "a"}
