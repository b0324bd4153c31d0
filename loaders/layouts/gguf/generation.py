"""How a model wants text generated: sampling, and the tokens that end a text. generation_config.json to GGUF and back.

Keys are those of gguf-py (gguf/constants.py: SAMPLING_*); from transformers' file they are read as gguf-py reads them
(gguf/metadata.py). llama.cpp takes them as its defaults (common/common.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loaders.architectures.family import text_config
from loaders.containers.gguf import MetadataValue, float32, text, uint32
from loaders.dtypes import shortest_decimal
from loaders.limits import CONFIG_VALUES, JSON_CONFIG
from loaders.storage.base import PinnedFiles
from loaders.storage.json_files import read_json

FILE = "generation_config.json"
INT32 = 5
# transformers' setting -> llama.cpp's, and whether that is a whole number
SAMPLING = {
    "temperature": ("temp", False), "top_k": ("top_k", True), "top_p": ("top_p", False), "min_p": ("min_p", False),
    "repetition_penalty": ("penalty_repeat", False), "xtc_probability": ("xtc_probability", False),
    "xtc_threshold": ("xtc_threshold", False), "penalty_last_n": ("penalty_last_n", True),
    "mirostat": ("mirostat", True), "mirostat_tau": ("mirostat_tau", False), "mirostat_eta": ("mirostat_eta", False),
}  # fmt: skip
SAMPLED_BY = ("temperature", "top_k", "top_p", "min_p")  # settings that only count where do_sample is set
# settings that change no text, or that other keys of a GGUF hold
APART = (
    "do_sample", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "cache_implementation", "trust_remote_code", "chat_format", "max_length", "_from_model_config",
)  # fmt: skip
EOS, EOT, EOM = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def read_generation(files: PinnedFiles) -> dict[str, Any]:
    """Return the contents of generation_config.json; nothing if there is none.

    Raises:
        BadCheckpoint: it is not a JSON object.
    """
    return read_json(files, FILE, JSON_CONFIG, CONFIG_VALUES) if files.find(FILE) is not None else {}


def sampling_metadata(generation: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Return llama.cpp's defaults for sampling. A temperature of 0 is how it is told not to sample."""
    found = {}
    for key, (name, is_whole) in SAMPLING.items():
        value = _number(generation.get(key))
        if value is not None:
            made = MetadataValue(INT32, int(value)) if is_whole else float32(float(value))
            found[f"general.sampling.{name}"] = made
    if isinstance(generation.get("sequence"), str):
        found["general.sampling.sequence"] = text(generation["sequence"])
    if generation.get("do_sample") is False:
        found["general.sampling.temp"] = float32(0.0)
    return found


def _number(value: Any) -> float | None:
    """Return a number as it is, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and abs(value) < 1 << 31 else None


def end_tokens(generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """Return the ids of all tokens that end a text: generation_config.json's, or else config.json's, as generate does.

    A config.json may have its class's default there, which is no token of the model.
    """
    said = generation.get("eos_token_id")
    said = text_config(config, "eos_token_id") if said is None else said
    numbers = said if isinstance(said, list) else [said]
    return list(dict.fromkeys(number for number in numbers if type(number) is int and number >= 0))


def end_metadata(made: Mapping[str, MetadataValue], ends: list[int]) -> dict[str, MetadataValue]:
    """Return the keys of tokens that end a text which `made` lacks. A GGUF has places for three: eos, eot and eom."""
    tokens = made["tokenizer.ggml.tokens"].value
    held = {made[key].value for key in (EOS, EOT, EOM) if key in made}
    found: dict[str, MetadataValue] = {}
    for number in ends:
        if number not in held and number < len(tokens):
            places = (EOS, EOM) if tokens[number] == "<|eom_id|>" else (EOS, EOT, EOM)
            free = next((key for key in places if key not in made and key not in found), None)
            found |= {} if free is None else {free: uint32(number)}
    return found


def left_out(generation: Mapping[str, Any], ends: list[int], made: Mapping[str, MetadataValue]) -> list[str]:
    """Say what of generation_config.json and of the tokens that end a text the metadata does not hold."""
    held = {made[key].value for key in (EOS, EOT, EOM) if key in made}
    beyond = [str(number) for number in ends if number not in held]
    said = [f"eos_token_id {', '.join(beyond)}: a GGUF holds three (eos, eot, eom)"] if beyond else []
    known = {*SAMPLING, "sequence", *APART}
    others = [key for key, value in generation.items() if key not in known and value not in (None, [], {}, False)]
    if others:
        said.append(f"{FILE}'s {', '.join(f'{key}={str(generation[key])[:40]}' for key in others)}")
    return said


def generation_file(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of generation_config.json that a GGUF's metadata stand for; empty if they say nothing."""
    found: dict[str, Any] = {}
    for key, (name, _) in SAMPLING.items():
        value = _number(metadata.get(f"general.sampling.{name}"))
        if value is not None:
            found[key] = shortest_decimal(value) if isinstance(value, float) else value
    if isinstance(metadata.get("general.sampling.sequence"), str):
        found["sequence"] = metadata["general.sampling.sequence"]
    if not found:
        return {}
    if found.get("temperature") == 0:
        del found["temperature"]
        found["do_sample"] = False
    elif any(key in found for key in SAMPLED_BY):
        found["do_sample"] = True
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    return ids | found
