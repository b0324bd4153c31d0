"""Names inside transformers, held against its own conversion."""

from __future__ import annotations

import json

import pytest

from loaders.architectures.renames import RENAMES_FILE, inside

CASES = (
    ("phimoe", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router"),
    ("deepseek_v4", "layers.3.attn.indexer.compressor.wgate", "layers.3.self_attn.compressor.indexer.gate_proj"),
    ("deepseek_v4", "head", "lm_head"),
    ("llava", "language_model.lm_head", "lm_head"),
    ("unheard_of", "layers.0.mlp.gate", "layers.0.mlp.gate"),
)


@pytest.mark.quick
@pytest.mark.parametrize(("model_type", "module", "wanted"), CASES)
def test_a_module_has_the_name_that_transformers_gives_it(model_type: str, module: str, wanted: str) -> None:
    assert inside(module, [model_type]) == wanted


@pytest.mark.engine
def test_the_renamings_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    kept = json.loads(RENAMES_FILE.read_text(encoding="utf-8"))
    if transformers.__version__ != kept["transformers"]:
        pytest.skip(f"the file is of transformers {kept['transformers']}, here is {transformers.__version__}")
    from tests.renames import renames

    assert renames() == kept
