"""Traits by a name's form are those by the name."""

from __future__ import annotations

import re

import pytest

from loaders.architectures.family import FAMILIES, GENERIC, Family, natural_key
from loaders.architectures.templates import STAND_IN, KnownTraits

pytestmark = pytest.mark.quick

NAMES = [
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "score.weight",
    *(
        f"{model}layers.{layer}.{part}"
        for model in ("model.", "", "model.language_model.", "language_model.model.", "vision_tower.encoder.")
        for layer in ("0", "7", "61", "007")
        for part in (
            "self_attn.q_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "self_attn.q_a_proj.bias",
            "mlp.gate.weight",
            "mlp.experts.0.up_proj.weight", "mlp.experts.131.down_proj.weight", "mlp.experts.3.gate_proj.weight",
            "block_sparse_moe.experts.5.w1.weight", "block_sparse_moe.experts.5.w2.weight",
            "mlp.shared_experts.up_proj.weight",
            "mlp.experts.gate_up_proj", "feed_forward.experts.12.up_proj.weight", "mlp.fc1.weight",
            "shared_head.norm.weight",
        )
    ),
    "encoder.layer.3.attention.self.query.weight", "encoder.layer.3.output.LayerNorm.gamma", "h.2.attn.c_attn.weight",
    "3.weight", "layers.3", "a.1.2.3.weight", f"model.layers.{STAND_IN}00.mlp.up_proj.weight",
]  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, GENERIC], ids=lambda family: family.name)
def test_traits_by_form_are_those_by_name(family: Family) -> None:
    known = KnownTraits(family)
    for shape in ((8, 8), (8,), (2, 8, 8)):
        for name in (*NAMES, *reversed(NAMES)):
            assert known(name, shape) == family.traits(name, shape), name


def test_a_name_with_very_many_numbers_is_looked_up_by_itself() -> None:
    name = "model.layers." + ".".join(map(str, range(150))) + ".weight"
    assert KnownTraits(GENERIC)(name, (8, 8)) == GENERIC.traits(name, (8, 8))


def test_natural_order_is_by_numbers_and_then_by_text() -> None:
    ordered = ["a", "a.0", "a.1.x", "a.2", "a.10", "a.10.b", "a.x", "a1", "a10", "ab", "b.0"]
    ordered.reverse()
    assert sorted(ordered, key=natural_key) == sorted(ordered, key=_by_parts)


def _by_parts(text: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]
