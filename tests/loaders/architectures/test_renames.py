"""Names inside transformers, held against its own conversion."""

from __future__ import annotations

import json

import pytest

from loaders.architectures.renames import RENAMES_FILE, inside, insides, is_bound, tied_heads, tied_layers

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


@pytest.mark.quick
def test_the_renamings_of_one_part_are_not_those_of_another() -> None:
    types = ("mistral_large4", "mistral_large4_text", "pixtral")
    found = insides("vision_encoder.transformer.layers.0.attention.wq", types)
    assert "model.vision_tower.transformer.layers.0.attention.wq" in found


BOUND = (
    ("zamba", "model.layers.11.shared_transf.self_attn.q_proj", True),
    ("zamba", "model.layers.11.linear", False),
    ("granite_speech5_ctc", "encoder.out", True),
    ("kyutai_speech_to_text", "codec_model.decoder_transformer.layers.0.mlp.fc1", True),
    ("kyutai_speech_to_text", "model.layers.0.mlp.fc1", False),
    ("t5", "decoder.block.0.layer.2.DenseReluDense.wo", True),
    ("t5", "decoder.block.0.layer.2.DenseReluDense.wi", False),
    ("git", "git.encoder.layer.0.output.dense", False),  # its head is called `output`, and tied to a table
)


@pytest.mark.quick
@pytest.mark.parametrize(("model_type", "module", "wanted"), BOUND)
def test_layers_that_share_a_weight_or_stay_float32_are_bound(model_type: str, module: str, wanted: bool) -> None:
    assert is_bound(module, [model_type]) is wanted


@pytest.mark.quick
def test_heads_and_layers_that_models_tie_are_known_by_type() -> None:
    assert tied_heads(["albert"]) == ("predictions.decoder",)
    assert tied_layers(["d_fine"]) == ("bbox_embed", "class_embed")
    assert tied_heads(["llama"]) == ()  # lm_head is everyone's


SAMPLE = ("albert", "d_fine", "granite_speech5", "molmo2", "t5", "whisper", "zamba")  # packages of transformers


@pytest.mark.engine
def test_the_renamings_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    kept = json.loads(RENAMES_FILE.read_text(encoding="utf-8"))
    if transformers.__version__ != kept["transformers"]:
        pytest.skip(f"the file is of transformers {kept['transformers']}, here is {transformers.__version__}")
    from tests.renames import renames

    # All classes take a minute to import; of these few everything must be the same, and of the rest what is found.
    found = renames(SAMPLE)
    for table in ("renames", "fused", "tied", "float32"):
        for model_type, rows in found[table].items():
            assert [row for row in rows if row not in kept[table][model_type]] == [], (table, model_type)
    for model_type in (*SAMPLE, "molmo2_text"):
        assert [found[t].get(model_type) for t in ("fused", "tied", "float32")] == [
            kept[t].get(model_type) for t in ("fused", "tied", "float32")
        ]
