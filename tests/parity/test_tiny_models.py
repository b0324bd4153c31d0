"""Tiny checkpoints have the names of published ones, and the same bytes wherever they are made."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests import tiny_models
from tests.header_checkpoints import entries
from tests.tiny_configs import TINY

pytestmark = pytest.mark.engine

# Types made after another variant of what tests/headers has
VARIANTS = {
    "gemma4_per_layer": "as E2B and E4B",
    "gpt_oss": "published in MXFP4, and converted to BF16 by many",
    "roberta": "as sentence encoders are saved, without the head",
    "internlm2": "made from the layout",
}
# Layers for multi-token prediction that the layouts in tests/headers lack, and GLM 4.6's norms, which Air lacks
ADDED = re.compile(r"\bmtp\.|mtp_|eh_proj|enorm|hnorm|shared_head|hc_head|self_attn\.[qk]_norm", re.IGNORECASE)
QUANTIZED = re.compile(r"[._](?:weight_scale_inv|weight_scale|scale|weight_packed|weight_shape|scales|blocks)$")


def plain(names: set[str]) -> set[str]:
    """Return names with those of what quantization stores as the weights' names."""
    return {QUANTIZED.sub(".weight", name) for name in names}


@pytest.mark.parametrize("kind", [kind for kind, tiny in TINY.items() if tiny.base and kind not in VARIANTS])
def test_names_are_the_published_ones(kind: str) -> None:
    _, tensors = tiny_models.model_of(kind)
    mine = plain({tiny_models.without_numbers(name) for name in tensors})
    published = entries()[TINY[kind].base]["tensors"]
    theirs = plain({tiny_models.without_numbers(pattern) for pattern, _, _ in published})
    assert not theirs - mine
    assert not {name for name in mine - theirs if not ADDED.search(name)}


def test_values_are_the_same_everywhere() -> None:
    made = tiny_models.uniform("model.norm.weight", 999)
    assert (made.dtype, made.shape, bool((abs(made) <= 1).all())) == (np.float32, (999,), True)
    assert hashlib.sha256(made.tobytes()).hexdigest() == (
        "6d15fbd7d1e3755580367c5cd76c215a7bda91d167b07d8dba536230200d85cf"
    )
