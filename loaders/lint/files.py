"""Checks of the files beside the weights (config.json, index, tokenizer, code), of sizes, and of tied heads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loaders.architectures.diffusers import DiffusersClass, class_of
from loaders.architectures.family import text_config
from loaders.architectures.layers import layers_of
from loaders.containers.pytorch import read_state
from loaders.errors import setting
from loaders.lint.base import Finding, Subject, fault, some, warning
from loaders.words import counted

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
NO_TOKENIZER = f"there is no tokenizer ({', '.join(TOKENIZERS[:3])}, ...)"
ANY = "every engine"
# What lacks a file may be the source itself, or have been made of one that lacks it, too.
PUBLISHED = "from where the model was published"
EMBEDDING = re.compile(r"^(?:language_model\.)?model\.(?:language_model\.)?embed_tokens\.weight$")
FROM_HIDDEN = re.compile(r"\.layers\.\d+\.(?:self_attn\.[qkv]_proj|mlp\.(?:gate|up)_proj)\.weight$")


def check(subject: Subject) -> Iterator[Finding]:
    """Yield the problems that any engine would have."""
    yield from _names(subject)
    yield from carried(subject)
    yield from _index(subject)


def carried(subject: Subject) -> Iterator[Finding]:
    """Yield the problems that any output of this checkpoint would have, too, in transformers' names."""
    yield from _config(subject)
    yield from _dimensions(subject)
    yield from _head(subject)


def _names(subject: Subject) -> Iterator[Finding]:
    """Check that engines find the tensors by their names in the files; here they are found by less."""
    checkpoint = subject.checkpoint
    remedy = f"convert it: a copy by {setting('quantize')}=none has plain names"
    wrapped = [spec.own_name for spec in checkpoint.weights if spec.own_name is not None]
    if wrapped:
        yield fault(
            ANY,
            f"{counted(len(wrapped), 'tensor has a name', 'tensors have names')} from training, such as"
            f" {wrapped[0]!r}",
            "finds no weights, and fails or computes with random ones", remedy,
        )  # fmt: skip
    if checkpoint.container == "pytorch":
        for file in checkpoint.files:
            keys = read_state(checkpoint.source, file.name).keys
            if keys:
                where = f"{file.name} holds the model under {'.'.join(keys)}, not at the top"
                yield fault(ANY, where, "finds no weights", remedy)


def _config(subject: Subject) -> Iterator[Finding]:
    source, config = subject.checkpoint.source, subject.config
    if not config:
        yield fault(ANY, "there is no config.json", "does not know what model this is", f"add it, {PUBLISHED}")
        return
    if subject.checkpoint.container == "gguf":
        return
    if (part := class_of(config)) is not None:
        if not DiffusersClass(part).is_known:
            yield warning(
                "diffusers",
                f"_class_name {part!r:.80} is not known here; it is a part of a pipeline of diffusers or of other code",
                "may know it or not: names were not checked against it",
                "load it once with diffusers",
            )
    elif not config.get("model_type"):
        yield fault(ANY, "config.json has no model_type", "does not know what model this is", f"take it {PUBLISHED}")
    elif subject.checkpoint.family.is_generic and not config.get("auto_map"):
        yield warning(
            ANY,
            f"model_type {config['model_type']!r} is not known here",
            "may know it or not: names and shapes were not checked against it",
            "load it once",
        )
    code = config.get("auto_map")
    if isinstance(code, dict):
        # An entry is FILE.CLASS, or REPOSITORY--FILE.CLASS for code in another repository of the Hub.
        files = sorted(
            {str(name).split("--")[-1].split(".")[0] + ".py" for name in code.values() if isinstance(name, str)}
        )
        missing = [name for name in files if source.find(name) is None]
        if missing:
            # Models that are known here are loaded by the engines' own classes, unless that code is asked for.
            level = fault if subject.checkpoint.family.is_generic else warning
            yield level(
                "transformers, vLLM",
                f"config.json's auto_map names code that is not there: {some(missing)}",
                "fail to load with trust_remote_code",
                f"add the files, {PUBLISHED}",
            )
    if not any(source.find(name) is not None for name in TOKENIZERS) and text_config(config, "vocab_size"):
        yield warning(
            ANY,
            NO_TOKENIZER,
            "loads the weights but cannot read text",
            f"add the tokenizer's files, {PUBLISHED}",
        )


def _dimensions(subject: Subject) -> Iterator[Finding]:
    """Check that config.json's sizes are those of the tensors, for keys that mean the same in every family."""
    if subject.checkpoint.family.is_generic or subject.checkpoint.container == "gguf":
        return
    # A tower has sizes of its own.
    for name, tensor in ((r.name, r) for r in subject.sources.tensors if r.role != "vision"):
        wanted: tuple[tuple[int, str], ...] = ()
        if EMBEDDING.search(name):
            wanted = ((0, "vocab_size"), (1, "hidden_size"))
        elif FROM_HIDDEN.search(name) and tensor.role != "vision":  # towers have a hidden_size of their own
            wanted = ((1, "hidden_size"),)
        for axis, key in wanted if len(tensor.shape) == 2 else ():
            size = text_config(subject.config, key)
            if isinstance(size, int) and tensor.shape[axis] != size:
                yield fault(
                    ANY,
                    f"config.json says {key} {size}, but {name} is {list(tensor.shape)}",
                    "fails on the shapes",
                    f"set {key} to {tensor.shape[axis]}, if the tensor is right",
                )
                return
    layers = layers_of(subject.config, (tensor.name for tensor in subject.sources.tensors))
    if layers.missing:
        missing = some(list(map(str, layers.missing)))
        yield fault(
            ANY,
            f"config.json says {layers.count} layers, but {counted(len(layers.missing), 'has', 'have')} no"
            f" tensors: {missing}",
            "computes with random layers, or fails",
            "set num_hidden_layers, or add the layers",
        )
    if layers.beyond:
        yield fault(
            "mlx-lm, llama.cpp, vLLM",
            f"config.json says {layers.count} layers, but"
            f" {counted(len(layers.beyond), 'tensor is', 'tensors are')} of layers beyond:"
            f" {some(list(layers.beyond))}",
            "refuse such tensors; transformers ignores them",
            "set num_hidden_layers, or drop the layers",
        )


def _index(subject: Subject) -> Iterator[Finding]:
    if subject.index is None:
        if len(subject.checkpoint.files) > 1 and subject.wants_index:
            yield fault(
                "transformers, vLLM",
                f"{len(subject.checkpoint.files)} weight files and no index",
                "transformers finds no weights; vLLM loads them all the same",
                f"write the index (a copy by {setting('quantize')}=none does)",
            )
        return
    metadata = subject.index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    real = sum(spec.size for spec in subject.checkpoint.weights)
    if total is not None and total != real:
        yield warning(
            "tools that plan memory by it",
            f"the index says total_size {total}, not the {real} bytes of its tensors",
            "take too much or too little",
            "set metadata.total_size to the sum of the tensors' bytes",
        )


def _head(subject: Subject) -> Iterator[Finding]:
    """Check that the output projection is there if, and only if, config.json says so."""
    names = {tensor.name for tensor in subject.sources.tensors}
    pairs = subject.checkpoint.family.tied_pairs(subject.config)
    for kept, tied in pairs:
        parts = [name for name in subject.by_name if name.startswith(tied) and name != tied]
        if parts and kept in names:
            yield fault(
                "transformers, vLLM",
                f"{tied} is quantized ({some(parts)}), while config.json ties it to {kept}",
                "ignore it or fail on its parts",
                "quantize neither, or set tie_word_embeddings to false",
            )
        elif tied in names and kept in names:
            yield warning(
                "vLLM, mlx-lm",
                f"{tied} differs from {kept}, while config.json ties them",
                "use the embedding for both, transformers uses both",
                "set tie_word_embeddings to false",
            )
    if not pairs and "model.embed_tokens.weight" in names and subject.config.get("architectures"):
        is_causal = any("ForCausalLM" in str(name) for name in subject.config["architectures"])
        if is_causal and not any(tensor.role == "head" for tensor in subject.sources.tensors):
            yield fault(
                "transformers",
                "there is no lm_head.weight, and config.json does not tie it to the embedding",
                "warns, and computes with a random output projection",
                "set tie_word_embeddings to true, or add the head",
            )
