"""Names in skip lists that fit the names which engines have inside."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from loaders.architectures.family import Family, family_of
from loaders.layouts.hf import is_skipped
from loaders.layouts.inside_names import modules_within, skip_names, tied_entries, tied_patterns

pytestmark = pytest.mark.quick


def family(*model_types: str) -> Family:
    whole, *parts = model_types
    return family_of({"model_type": whole, **{f"part_{i}": {"model_type": part} for i, part in enumerate(parts)}})


def skipped(module: str, kept: Sequence[str], quantized: Sequence[str], of: Family) -> bool:
    """Whether transformers would skip a module, by its name inside, with the skip list that is written."""

    def catches(entry: str) -> bool:
        return any(is_skipped(name, [entry]) for name in quantized)

    return is_skipped(module, skip_names(kept, (), tied_entries(of, kept, has_head=False), of, catches))


TIED = (
    ("albert", "predictions.decoder"),
    ("blip", "text_decoder.cls.predictions.decoder"),
    ("blip-2", "language_model.lm_head"),
    ("granite_speech5_ctc", "ctc_head"),
    ("d_fine", "model.decoder.bbox_embed.2.layers.0"),
    ("zamba", "model.layers.17.shared_transf.feed_forward.up_proj"),
)


@pytest.mark.parametrize(("model_type", "module"), TIED)
def test_what_is_tied_and_not_stored_is_named(model_type: str, module: str) -> None:
    assert skipped(module, (), (), family(model_type))
    assert any(re.match(pattern, module) for pattern in tied_patterns(family(model_type), (), has_head=False))
    assert not skipped("model.layers.0.mlp.up_proj", (), (), family(model_type))


def test_a_part_that_is_kept_in_float32_is_named_as_a_whole() -> None:
    kept = ("codec_model.decoder_transformer.layers.0.mlp.fc1",)
    inside = "codec_model.decoder.decoder_transformer.layers.0.mlp.fc1"
    assert skipped(inside, kept, ("model.layers.0.mlp.fc1",), family("kyutai_speech_to_text"))


def test_a_tower_is_named_only_if_all_of_it_is_kept() -> None:
    kept = ("multi_modal_projector.cross_attn.out_proj",)
    quantized = ("multi_modal_projector.cross_attn.linear",)
    inside = "model.multi_modal_projector.cross_attn.linear"
    assert not skipped(inside, kept, quantized, family("aria"))
    assert skipped("model.vision_tower.layers.0.fc1", ("vision_tower.layers.0.fc1",), quantized, family("aria"))


def test_a_fused_layer_does_not_name_one_of_another_part() -> None:
    of = family("molmo2", "molmo2_text")
    kept = ("model.transformer.blocks.0.self_attn.att_proj",)
    quantized = ("model.vision_tower.layers.0.self_attn.q_proj",)
    assert skipped("model.language_model.layers.0.self_attn.q_proj", kept, quantized, of)
    assert not skipped("model.vision_tower.layers.0.self_attn.q_proj", kept, quantized, of)


def test_a_weight_that_is_not_called_so_has_the_name_of_its_module() -> None:
    name = "model.llm.layers.5.attn.k_sconv.weight_proj"
    assert modules_within(name, family("inkling2_text")) == ("model.layers.5.self_attn.k_sconv.weight_proj",)
    assert modules_within("model.layers.0.mlp.up_proj.weight", family("inkling2_text")) == ()
