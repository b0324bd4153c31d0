"""Tensors of a GGUF that are made of several: where each part lies, and what is refused."""

from __future__ import annotations

import pytest

from loaders.architectures.gguf import GgufName
from loaders.dtypes import DTYPES, Shape
from loaders.errors import BadSpec
from loaders.layouts.gguf.wholes import Whole, wholes
from loaders.quantization.schemes.plain import Plain
from loaders.specs import StoredSpec
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor

pytestmark = pytest.mark.quick


def part(
    expert: int | None, number: int, shape: Shape, parts: int = 2, dtype: str = "F32"
) -> tuple[GgufName, Encoding]:
    tensor = LogicalTensor(
        name=f"{expert}.{number}", dtype=DTYPES[dtype], shape=shape, stored=(), window=None, decode=None
    )
    return GgufName("whole", expert, number, parts), Encoding(tensor=tensor, action="keep", scheme=Plain())


def test_parts_of_an_expert_follow_each_other_in_the_order_of_their_numbers() -> None:
    parts = [part(expert, number, (3 + number, 8)) for expert in (1, 0) for number in (1, 0)]
    found = wholes(parts, 2)["whole"]
    assert found == Whole(StoredSpec(DTYPES["F32"], (2, 7, 8)), (0, 96, 224))
    assert [found.offset(name) for name, _ in parts] == [224 + 96, 224, 96, 0]


def test_biases_of_experts_are_stacked() -> None:
    found = wholes([part(expert, 0, (8,), parts=1) for expert in range(3)], 3)["whole"]
    assert found.spec.shape == (3, 8)
    assert found.offset(GgufName("whole", 2)) == 64


def test_parts_without_experts() -> None:
    assert wholes([part(None, 0, (2, 8)), part(None, 1, (4, 8))], 0)["whole"].spec.shape == (6, 8)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part(0, 0, (2, 8), 1)], "1 experts to stack, config.json says 2"),
        ([part(0, 0, (2, 8)), part(1, 0, (2, 8)), part(1, 1, (2, 8))], "2 experts to stack"),
        ([part(None, 0, (2, 8))], "1 of the 2 tensors that it is made of"),
        ([part(0, 0, (2, 8), 1), part(1, 0, (3, 8), 1)], "differ in shape or type"),
        ([part(0, 0, (2, 8), 1), part(1, 0, (2, 8), 1, "BF16")], "differ in shape or type"),
        ([part(None, 0, (2, 8)), part(None, 1, (2, 16))], "differ in shape or type"),
    ],
)
def test_what_does_not_fit_is_refused(parts: list[tuple[GgufName, Encoding]], message: str) -> None:
    with pytest.raises(BadSpec, match=message):
        wholes(parts, 2)
