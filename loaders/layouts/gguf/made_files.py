"""The files that transformers expects beside the weights, made from a GGUF's metadata, and what they do not hold."""

from __future__ import annotations

from loaders.architectures.gguf_config import left_out
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import gguf
from loaders.layouts.gguf.generation import FILE, generation_file
from loaders.layouts.gguf.tokenizers.special_tokens import KEYS
from loaders.layouts.gguf.tokenizers.tokenizer_files import TOKENIZERS, tokenizer_files
from loaders.storage.json_files import json_bytes

# keys of the tokenizer and of the whole file that are read, or that say nothing of how the model computes
KNOWN = (
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "scores", "token_type", "merges")),
    *(f"tokenizer.ggml.{key}_token_id" for key in KEYS.values()),
    *(f"tokenizer.ggml.add_{key}" for key in ("bos_token", "eos_token", "sep_token", "space_prefix")),
    "tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.prefix_token_id", "tokenizer.ggml.suffix_token_id",
    "tokenizer.ggml.middle_token_id",
)  # fmt: skip


def made_files(checkpoint: Checkpoint) -> tuple[dict[str, bytes], list[str]]:
    """Return the files by name, and notes on what is lost; nothing if the source is no GGUF."""
    if checkpoint.container != "gguf":
        return {}, []
    metadata = gguf.plain(gguf.read_metadata(checkpoint.source, checkpoint.files[0].name))
    made, notes = tokenizer_files(checkpoint), []
    if not made and not set(TOKENIZERS) & set(checkpoint.aux):
        kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        notes.append(
            f"the output has no tokenizer: the GGUF's (model {kind!r}, pre {pre!r}) is not one that is made into"
            " tokenizer.json here; copy the original model's files beside the weights"
        )
    if FILE not in checkpoint.aux and (generation := generation_file(metadata, checkpoint.config)):
        made = {**made, FILE: json_bytes(generation)}
    beyond = [key for key in metadata if key.startswith("tokenizer.ggml.") and key not in KNOWN]
    notes += [f"transformers' files have no place for the GGUF's {each}" for each in left_out(metadata)]
    notes += [f"transformers' files have no place for the GGUF's {key} = {str(metadata[key])[:40]}" for key in beyond]
    return made, notes
