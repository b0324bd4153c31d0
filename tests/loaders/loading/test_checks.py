"""Shapes that were expected, and tensors that are shared."""

from __future__ import annotations

import numpy as np
import pytest

import loaders
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
    kept = filter_shared_tensors(
        {"row": table[1], "embed": table, "head": table, "copy": other, "turned": table.t(), "none": torch.empty(0)}
    )
    assert list(kept) == ["embed", "copy", "none"]
    assert kept["embed"] is table
    assert kept.same == {"row": "embed", "head": "embed", "turned": "embed"}
    array = np.ones((3, 3), np.float32)
    assert filter_shared_tensors({"a": array, "b": array[::-1], "c": array.copy()}).same == {"b": "a"}
    specs = {"a": spec("a", 2), "b": spec("b", 2), "c": spec("c", 2, offset=4)}
    assert filter_shared_tensors(specs).same == {"b": "a"}
    assert filter_shared_tensors(tensors={}) == {}


def test_parts_of_one_buffer_that_share_no_byte_are_all_kept() -> None:
    buffer = torch.arange(12.0).reshape(3, 4)
    halves = {"left": buffer[:, :2], "right": buffer[:, 2:], "left again": buffer[:, :2], "over": buffer.flatten()[2:8]}
    kept = filter_shared_tensors(halves)
    assert list(kept) == ["left", "right", "over"]
    assert kept.same == {"left again": "left"}
    assert list(filter_shared_tensors({**halves, "all": buffer})) == ["all"]
    assert list(filter_shared_tensors({"top": buffer[:2], "bottom": buffer[2:]})) == ["top", "bottom"]
    assert list(filter_shared_tensors({"every": buffer[0, :3:2], "dense": buffer[0, :3]})) == ["dense"]


def test_second_names_are_the_same_functions() -> None:
    assert loaders.compute_weight_hash_rust(data=b"abc") == loaders.compute_weight_hash(b"abc")
    specs = [{"name": "a", "shape": (2, 3)}]
    loaders.validate_weight_shapes_rust(specs, [{"name": "a", "shape": [2, 3]}])
    with pytest.raises(BadCheckpoint, match=r"a: expected \[3\], found \[2, 3\]"):
        loaders.validate_weight_shapes(specs=specs, expected={"a": (3,)})
