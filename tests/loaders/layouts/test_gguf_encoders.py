"""Encoders, state spaces and Llama 4 in a GGUF: what llama.cpp would compute otherwise, poolings, and positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loaders.architectures.gguf import architecture_of, completed
from loaders.containers.gguf import plain
from loaders.errors import BadCheckpoint, BadSpec
from loaders.layouts.gguf.keys.pooling import pooling_metadata
from loaders.layouts.gguf.metadata import model_metadata
from loaders.storage.base import PinnedFiles
from loaders.storage.folder import Folder

pytestmark = pytest.mark.quick

SIZES = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 66, "vocab_size": 320,
}  # fmt: skip
MAMBA = {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "rms_norm_eps": 1e-5}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"layer_norm_eps": 1e-12},
    "roberta": {"layer_norm_eps": 1e-12, "pad_token_id": 1},
    "modernbert": {"norm_eps": 1e-5},
    "falcon_h1": MAMBA,
    "jamba": {"rms_norm_eps": 1e-6},
    "mamba2": {"intermediate_size": 128, "head_dim": 32},
    "llama4": {"num_local_experts": 16, "rms_norm_eps": 1e-5, "interleave_moe_layer_step": 2},
}


def metadata_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return the keys of a model by their names after the architecture's."""
    config = {"model_type": model_type, **SIZES, **CONFIGS[model_type], **changes}
    found = plain(model_metadata(architecture_of(config), completed(config)))
    return {key.partition(".")[2]: value for key, value in found.items()}


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("bert", {"is_decoder": True}, "as an encoder"),
        ("bert", {"position_embedding_type": "relative_key"}, "one embedding for each position"),
        ("bert", {"hidden_act": "relu"}, "with gelu"),
        ("bert", {"architectures": ["BertForSequenceClassification"]}, "without the pooler"),
        ("roberta", {"architectures": ["RobertaForTokenClassification"]}, "and no TokenClassification"),
        ("roberta", {"lora_adaptations": ["text-matching"]}, "in files of their own"),
        ("roberta", {"id2label": {"zero": "a"}}, "names of classes by number"),
        ("modernbert", {"classifier_pooling": "max"}, "by cls or mean"),
        ("modernbert", {"layer_types": ["sliding_attention"] * 4}, r"every 4\. layer"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "no rotary embeddings"),
        ("falcon_h1", {"time_step_limit": [0.0, 0.5]}, "within no limits"),
        ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}, "after the gate"),
        ("falcon_h1", {"tie_word_embeddings": True, "lm_head_multiplier": 0.5}, "one embedding cannot have two"),
        ("falcon_h1", {"attention_bias": True}, "no biases of attention"),
        ("jamba", {"mamba_expand": 4}, "twice the width"),
        ("jamba", {"head_dim": 32}, "for head_dim 32"),
        ("mamba2", {"use_conv_bias": False}, "a bias of each convolution"),
        ("mamba2", {"head_dim": 48}, "heads of one size"),
        ("llama4", {"attention_chunk_size": 4096}, "chunks of 8192"),
        ("llama4", {"layer_types": ["full_attention"] * 4}, "other layers than layer_types"),
        ("llama4", {"no_rope_layers": [1, 0, 1, 0]}, "other layers than no_rope_layers"),
        ("llama4", {"moe_layers": [0, 1, 2, 3]}, "other layers than moe_layers"),
        ("llama4", {"use_qk_norm": False}, "with 16 here"),
        ("llama4", {"attn_temperature_tuning": False}, "attn_temperature_tuning is off"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(model_type: str, changes: dict[str, Any], why: str) -> None:
    metadata_of(model_type)
    with pytest.raises(BadSpec, match=why):
        metadata_of(model_type, **changes)


def test_keys_of_encoders_follow_from_either_style_of_config_json() -> None:
    assert metadata_of("roberta")["context_length"] == 64
    assert metadata_of("roberta", pad_token_id=None)["context_length"] == 66
    new = {"full_attention": {"rope_theta": 170000.0}, "sliding_attention": {"rope_theta": 12000.0}}
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    for style in (
        {"rope_parameters": new, "layer_types": kinds},
        {"global_rope_theta": 170000.0, "local_rope_theta": 12000.0, "global_attn_every_n_layers": 2},
    ):
        found = metadata_of("modernbert", **style)
        bases = found["rope.freq_base"], found["rope.freq_base_swa"]
        assert (*bases, found["attention.sliding_window_pattern"]) == (170000.0, 12000.0, 2)
    assert metadata_of("modernbert")["rope.freq_base"] == 160000.0


def test_classes_are_named_unless_nobody_named_them() -> None:
    two = {"0": "LABEL_0", "1": "LABEL_1"}
    assert "classifier.output_labels" not in metadata_of("roberta", id2label=two)
    head = ["RobertaForSequenceClassification"]
    assert metadata_of("roberta", id2label=two, architectures=head)["classifier.output_labels"] == tuple(two.values())
    eleven = {str(number): f"class {number}" for number in range(11)}
    assert metadata_of("roberta", id2label=eleven)["classifier.output_labels"] == tuple(eleven.values())


def files_with(folder: Path, modules: Any, pooling: Any = None) -> PinnedFiles:
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {}))
    return PinnedFiles(Folder(folder))


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, 1),
        ({"pooling_mode_cls_token": True}, 2),
        ({"pooling_mode_lasttoken": True}, 3),
        ({"pooling_mode": "mean"}, 1),
    ],
)
def test_a_pooling_is_that_of_sentence_transformers(settings: dict[str, Any], number: int, tmp_path: Path) -> None:
    module = "sentence_transformers.models."
    modules = [{"type": f"{module}{kind}", "path": path} for kind, path in
               (("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"))]  # fmt: skip
    found, left_out = pooling_metadata(files_with(tmp_path, modules, settings), "bert")
    assert plain(found) == {"bert.pooling_type": number}
    assert left_out == ["Dense of modules.json (2_Dense)"]


@pytest.mark.parametrize(
    ("modules", "error", "why"),
    [
        ([{"type": "x.Pooling", "path": "1_Pooling"}], BadSpec, "mean, cls, lasttoken"),
        ([{"type": "x.Pooling", "path": "../1_Pooling"}], BadCheckpoint, "a folder of the checkpoint"),
        ([{"type": "x.Pooling"}], BadCheckpoint, "with type and path"),
        ({"type": "x.Pooling"}, BadCheckpoint, "a list of modules"),
    ],
)
def test_other_poolings_are_refused(modules: Any, error: type[Exception], why: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=why):
        pooling_metadata(files_with(tmp_path, modules, {"pooling_mode_max_tokens": True}), "bert")
