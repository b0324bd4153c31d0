"""Which of transformers' classes a checkpoint is of, and so what of it can be judged: logits, or hidden states.

Everything is told from config.json, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from loaders.architectures.family import text_config
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec, setting
from loaders.words import model_type_said, shown

# Parts of class names of models that do not predict the next token, though their model_type has such a class too.
ENCODER_ONLY = ("MaskedLM", "PreTraining", "Classification", "Answering", "Encoder")
# transformers' Auto classes of models of text by the middle of their names; the first that has a model's class loads it
HEADS = {
    "CAUSAL_LM": "ForCausalLM",
    "MASKED_LM": "ForMaskedLM",
    "SEQUENCE_CLASSIFICATION": "ForSequenceClassification",
    "TOKEN_CLASSIFICATION": "ForTokenClassification",
    "QUESTION_ANSWERING": "ForQuestionAnswering",
    "PRETRAINING": "ForPreTraining",
    "TEXT_ENCODING": "ForTextEncoding",
}
# Model types whose positions are counted from the number after the padding token's, as RoBERTa's are
AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
WIDE = 16384
OTHER_INPUTS = ("vision_config", "audio_config", "speech_config")


def _mapping(name: str) -> Mapping[str, Any]:
    """Return a table of transformers: class names by model_type."""
    tables: Any = import_module("transformers.models.auto.modeling_auto")
    found: Mapping[str, Any] = getattr(tables, f"MODEL_{name}MAPPING_NAMES")
    return found


def _built(config: Mapping[str, Any]) -> tuple[str, ...]:
    built = config.get("architectures")
    return tuple(map(str, built)) if isinstance(built, list) else ()


def built_without_logits(config: Mapping[str, Any]) -> str:
    """Return the class of a config that, by its name alone, predicts no next token; "" if its name does not tell."""
    built = _built(config)
    tells = any(word in name for name in built for word in ENCODER_ONLY) or not any(
        word in name for name in built for word in ("LM", "Generation", "GPT")
    )
    return shown(built[0]) if built and tells else ""


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a causal language model of transformers, which has logits of the next token.

    A base model (BertModel, LlamaModel) has none. Nor has, unless its class says otherwise, a model of a type that
    predicts masked tokens.
    """
    kind, built = config.get("model_type"), _built(config)
    causal, masked = _mapping("FOR_CAUSAL_LM_"), _mapping("FOR_MASKED_LM_")
    if not isinstance(kind, str) or kind not in causal or config.get("is_encoder_decoder"):
        return False
    if any(word in name for name in built for word in ENCODER_ONLY) or _mapping("").get(kind) in built:
        return False
    return kind not in masked or causal[kind] in built


def has_causal_class(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a class of causal language models for a config's model_type."""
    return config.get("model_type") in _mapping("FOR_CAUSAL_LM_")


def not_causal(checkpoint: Checkpoint) -> BadSpec:
    """Return the refusal to load a checkpoint as a causal language model, which it is not."""
    return BadSpec(
        f"name_or_path: expected a causal language model, which predicts the next token, found {_said(checkpoint)};"
        " models of other kinds are quantized by jobs, and loaded by transformers' AutoModel"
    )


def check_causal(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has logits to be judged by.

    Raises:
        BadSpec: it is no causal language model.
    """
    if not is_causal(checkpoint.config):
        raise _refused(checkpoint, "is no causal language model of transformers")


def encodes(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has hidden states of a text alone to be judged by."""
    try:
        check_encodes(checkpoint)
    except BadSpec:
        return False
    return True


def check_encodes(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has hidden states of a text alone to be judged by.

    Raises:
        BadSpec: it is no model of text of transformers, or one of an encoder and a decoder.
    """
    config = checkpoint.config
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _mapping(""):
        raise _refused(checkpoint, "is no model that transformers knows")
    if config.get("is_encoder_decoder") and _mapping("FOR_TEXT_ENCODING_").get(kind) not in _built(config):
        raise _refused(checkpoint, "is made of an encoder and a decoder, which are not judged here")
    if not is_causal(config) and any(isinstance(config.get(name), dict) for name in OTHER_INPUTS):
        raise _refused(checkpoint, "takes more than text, and is not judged here")


def _refused(checkpoint: Checkpoint, why: str) -> BadSpec:
    return BadSpec(f"{setting('evaluate')}: {checkpoint.address} {why} ({_said(checkpoint)})")


def _said(checkpoint: Checkpoint) -> str:
    return ", ".join([model_type_said(checkpoint.config), *_built(checkpoint.config)])


def width_of(config: Mapping[str, Any]) -> int:
    """Return how many numbers a hidden state has, as far as a config says so; a large number where it does not."""
    found = (text_config(config, name) for name in ("hidden_size", "n_embd", "d_model", "dim"))
    return next((int(width) for width in found if isinstance(width, int) and width > 0), WIDE)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model takes at once, None if its config does not say."""
    most = text_config(config, "max_position_embeddings")
    if not isinstance(most, int) or most < 1:
        return None
    padding = config.get("pad_token_id", 1)
    is_after = config.get("model_type") in AFTER_PADDING and isinstance(padding, int)
    return most - padding - 1 if is_after else most


def auto_of(config: Mapping[str, Any]) -> Any:
    """Return the Auto class of transformers that loads a model as the class that its config names, with its head.

    Quantized modules are listed by the names that they have in that class.
    """
    kind, built = config.get("model_type"), _built(config)
    found = next((auto for name, auto in HEADS.items() if _mapping(f"FOR_{name}_").get(str(kind)) in built), "")
    transformers: Any = import_module("transformers")
    return getattr(transformers, f"AutoModel{found}")
