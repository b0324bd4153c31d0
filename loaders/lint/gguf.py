"""Checks of GGUF files, as llama.cpp reads them: metadata that it needs, a tensor for every place, sizes that agree.

The keys that are required, and those for which llama.cpp silently takes a default, are from src/llama-model.cpp
(load_hparams and load_tensors of each architecture) and src/llama-vocab.cpp. Of the architectures that are read here,
every tensor of every block is known; of the others in gguf-py's table, the tensors that they may have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loaders.architectures import gguf_names
from loaders.architectures.gguf import Architecture, architecture_named
from loaders.containers import gguf
from loaders.dtypes import GGML_BLOCKS, GGML_READ_BLOCKS
from loaders.lint.base import Finding, Subject, fault, some, warning
from loaders.lint.engines.gguf import unknown
from loaders.specs import WeightSpec
from loaders.words import counted

ENGINE = "llama.cpp"
AGAIN = "convert the model again"
BLOCK = re.compile(r"^blk\.(\d+)\.")
STACK = re.compile(r"ffn_(?:gate|up|down|gate_up)_exps\.weight$")
EMBEDDING, NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
# keys under the architecture's name without which loading fails; those of DEFAULTED have a default that may be wrong
REQUIRED = ("context_length", "embedding_length", "block_count")
READ_REQUIRED = ("feed_forward_length", "attention.head_count", "attention.layer_norm_rms_epsilon")
MOE_REQUIRED = ("expert_count", "expert_used_count")
DEFAULTED = {"rope.freq_base": "10000", "attention.head_count_kv": "as many as attention.head_count"}
# Architectures that turn no positions: llama.cpp's graphs of them have none of its RoPE.
WITHOUT_ROPE = ("bert", "jina-bert-v2", "t5", "t5encoder", "gpt2", "bloom", "mpt", "starcoder", "mamba", "mamba2")
# Encoders, which have as many heads of keys and values as of queries.
ENCODERS = ("bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "modern-bert", "t5encoder")
ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
HEAD_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
EXTRA = {"qwen3": HEAD_NORMS, "qwen3moe": HEAD_NORMS}


def check(subject: Subject) -> Iterator[Finding]:
    """Yield the problems that llama.cpp would have."""
    checkpoint = subject.checkpoint
    metadata = gguf.plain(gguf.read_metadata(checkpoint.source, checkpoint.files[0].name))
    specs, name = subject.by_name, metadata.get("general.architecture")
    if not isinstance(name, str):
        yield fault(ENGINE, "the metadata has no general.architecture", "does not load it", AGAIN)
        return
    architecture, known = architecture_named(name), gguf_names.tensor_names(name)
    yield from _sizes(name, metadata, specs, is_read=architecture is not None)
    yield from _tokenizer(metadata, specs)
    yield from _top(specs, has_norm="output_norm" in known and "token_embd_norm" not in known)
    yield from _types(specs)
    if architecture is not None:
        yield from _blocks(architecture, metadata, specs)
        yield from _shapes(name, metadata, specs)
    elif known:
        yield from _beyond(name, metadata, specs)
        yield from _strangers(name, unknown([*specs], known))
    else:
        yield warning(
            ENGINE, f"architecture {name} is not known here", "may want tensors that are not there", "load it once"
        )
    yield from _stacks(name, metadata, specs)


def _sizes(
    name: str, metadata: Mapping[str, Any], specs: Mapping[str, WeightSpec], *, is_read: bool
) -> Iterator[Finding]:
    has_experts = any("_exps." in tensor for tensor in specs)
    wanted = (*REQUIRED, *(READ_REQUIRED if is_read else ()), *(MOE_REQUIRED if has_experts else ()))
    missing = [f"{name}.{key}" for key in wanted if f"{name}.{key}" not in metadata]
    if missing:
        yield fault(ENGINE, f"the metadata lacks {some(missing)}", "fails: key not found in model", AGAIN)
    unread = {"rope.freq_base": WITHOUT_ROPE, "attention.head_count_kv": ENCODERS}
    for key, taken in DEFAULTED.items():
        if name not in unread[key] and f"{name}.{key}" not in metadata:
            yield warning(ENGINE, f"the metadata does not say {name}.{key}", f"silently takes {taken}", AGAIN)


def _tokenizer(metadata: Mapping[str, Any], specs: Mapping[str, WeightSpec]) -> Iterator[Finding]:
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind is None:
        yield fault(ENGINE, "the metadata has no tokenizer.ggml.model", "fails: cannot find tokenizer", AGAIN)
        return
    if kind in ("none", "no_vocab"):
        return
    if not isinstance(tokens, tuple) or not tokens:
        yield fault(ENGINE, "the metadata has no tokenizer.ggml.tokens", "fails: cannot find tokenizer vocab", AGAIN)
        return
    rows = specs[EMBEDDING].shape[0] if EMBEDDING in specs and specs[EMBEDDING].shape else None
    if rows is not None and rows != len(tokens):
        yield fault(
            ENGINE, f"the tokenizer has {len(tokens)} tokens, {EMBEDDING} {rows} rows",
            "fails: the tensor has the wrong shape", "convert again with a tokenizer of as many tokens",
        )  # fmt: skip
    for key in ("scores", "token_type"):
        found = metadata.get(f"tokenizer.ggml.{key}")
        if found is not None and len(found) != len(tokens):
            yield fault(
                ENGINE, f"tokenizer.ggml.{key} has {len(found)} entries for {len(tokens)} tokens",
                "reads beyond them", AGAIN,
            )  # fmt: skip
    if kind == "llama" and "tokenizer.ggml.scores" not in metadata:
        yield fault(ENGINE, "a SentencePiece vocabulary without tokenizer.ggml.scores", "cuts text wrongly", AGAIN)
    if kind == "gpt2":
        yield from _byte_level(metadata)
    ids = {key: value for key, value in metadata.items() if re.match(r"tokenizer\.ggml\.\w+_token_id$", key)}
    beyond = [f"{key} {value}" for key, value in ids.items() if not 0 <= value < len(tokens)]
    if beyond:
        yield warning(ENGINE, f"ids of no token: {some(beyond)}", "ignores them, and uses its defaults", AGAIN)


def _byte_level(metadata: Mapping[str, Any]) -> Iterator[Finding]:
    if "tokenizer.ggml.merges" not in metadata:
        yield fault(ENGINE, "the metadata has no tokenizer.ggml.merges", "fails: cannot find tokenizer merges", AGAIN)
    pre = metadata.get("tokenizer.ggml.pre")
    if pre in (None, "default"):
        from loaders.layouts.gguf.tokenizers.pre_tokenizers import known_names  # tables that only this finding needs

        known = ", ".join(known_names())
        yield warning(
            ENGINE, f"tokenizer.ggml.pre is {pre or 'missing'}", "cuts text as the model was not trained to see it",
            f"set it to the tokenizer's own ({known}, ...), or {AGAIN}",
        )  # fmt: skip


def _top(specs: Mapping[str, WeightSpec], *, has_norm: bool) -> Iterator[Finding]:
    missing = [name for name in (EMBEDDING, *((NORM,) if has_norm else ())) if name not in specs]
    if missing:
        yield fault(ENGINE, f"not there: {some(missing)}", "fails: missing tensor", AGAIN)
    if EMBEDDING in specs and HEAD in specs and specs[HEAD].shape != specs[EMBEDDING].shape:
        yield fault(
            ENGINE, f"{HEAD} is {list(specs[HEAD].shape)}, {EMBEDDING} {list(specs[EMBEDDING].shape)}",
            "fails: the tensor has the wrong shape", AGAIN,
        )  # fmt: skip


def _types(specs: Mapping[str, WeightSpec]) -> Iterator[Finding]:
    blocks = GGML_BLOCKS | GGML_READ_BLOCKS
    wrong = [
        f"{s.name} ({s.dtype})" for s in specs.values() if len(s.shape) < 2 and s.dtype.name in (*blocks, "BF16", "F16")
    ]
    if wrong:
        yield fault(
            ENGINE, f"{counted(len(wrong), 'vector is', 'vectors are')} not float32: {some(wrong)}",
            "stops when it computes with them", "keep them in float32",
        )  # fmt: skip


def _blocks(
    architecture: Architecture, metadata: Mapping[str, Any], specs: Mapping[str, WeightSpec]
) -> Iterator[Finding]:
    """Check that every block is there with all its tensors, and that there are no others."""
    count = metadata.get(f"{architecture.name}.block_count")
    if not isinstance(count, int):
        return
    yield from _beyond(architecture.name, metadata, specs)
    is_mixture = bool(metadata.get(f"{architecture.name}.expert_count", 0))
    parts = [f"{part}.weight" for part in (*ATTENTION, *(EXPERTS if is_mixture else DENSE))]
    parts += EXTRA.get(architecture.name, ())
    # The bound is for a damaged block_count, which could make this list endless.
    missing = [f"blk.{n}.{part}" for n in range(min(count, 4096)) for part in parts if f"blk.{n}.{part}" not in specs]
    if missing:
        yield fault(
            ENGINE,
            f"{counted(len(missing), 'tensor is', 'tensors are')} not there: {some(missing)}",
            "fails: missing tensor",
            AGAIN,
        )
    biases = (architecture.gguf_name(f"model.layers.0.{module}.bias") for module in architecture.biases)
    known = {*parts, *(BLOCK.sub("", bias.name) for bias in biases if bias is not None)}
    known |= {"rope_freqs.weight"} if architecture.has_factors else set()
    others = [
        name
        for name in specs
        if BLOCK.sub("", name) not in known
        and name not in (EMBEDDING, NORM, HEAD)
        and not name.endswith(("_scale", ".scale"))
    ]
    yield from _strangers(architecture.name, others)


def _beyond(name: str, metadata: Mapping[str, Any], specs: Mapping[str, WeightSpec]) -> Iterator[Finding]:
    """Check that no block is after the last that the metadata counts, and that none before it is missing."""
    count = metadata.get(f"{name}.block_count")
    if not isinstance(count, int):
        return
    found = {int(match[1]) for tensor in specs if (match := BLOCK.match(tensor))}
    beyond = sorted(number for number in found if number >= count)
    if beyond:
        yield fault(
            ENGINE, f"block_count is {count}, but there are tensors of blk.{beyond[0]}",
            "fails: wrong number of tensors", f"set {name}.block_count to {max(found) + 1}",
        )  # fmt: skip
    # The bound is for a damaged block_count, which could make this list endless.
    missing = [f"blk.{number}" for number in range(min(count, 4096)) if number not in found]
    if missing and architecture_named(name) is None:
        yield fault(ENGINE, f"{len(missing)} blocks are not there: {some(missing)}", "fails: missing tensor", AGAIN)


def _strangers(name: str, tensors: list[str]) -> Iterator[Finding]:
    if tensors:
        yield warning(
            ENGINE, f"{counted(len(tensors), 'tensor')} that {name} does not have: {some(tensors)}",
            "may fail: wrong number of tensors", "drop them by a rule",
        )  # fmt: skip


def _stacks(name: str, metadata: Mapping[str, Any], specs: Mapping[str, WeightSpec]) -> Iterator[Finding]:
    """Check that stacks have as many experts as the metadata says."""
    experts = metadata.get(f"{name}.expert_count")
    wrong = [
        f"{spec.name} {list(spec.shape)}"
        for spec in specs.values()
        if STACK.search(spec.name) and isinstance(experts, int) and (len(spec.shape) < 3 or spec.shape[0] != experts)
    ]
    if wrong:
        yield fault(
            ENGINE, f"{len(wrong)} stacks of experts are not of expert_count {experts}: {some(wrong)}",
            "fails: the tensor has the wrong shape", AGAIN,
        )  # fmt: skip


def _shapes(name: str, metadata: Mapping[str, Any], specs: Mapping[str, WeightSpec]) -> Iterator[Finding]:
    """Check that tensors have the shapes that the metadata implies."""
    hidden, heads = metadata.get(f"{name}.embedding_length"), metadata.get(f"{name}.attention.head_count")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return
    key = metadata.get(f"{name}.attention.key_length", hidden // heads)
    value = metadata.get(f"{name}.attention.value_length", hidden // heads)
    groups = metadata.get(f"{name}.attention.head_count_kv", heads)
    experts = metadata.get(f"{name}.expert_count", 0)
    if not all(isinstance(n, int) for n in (key, value, groups, experts)):
        return
    wanted = {"attn_q": (heads * key, hidden), "attn_k": (groups * key, hidden), "attn_v": (groups * value, hidden),
              "attn_output": (hidden, heads * value), "attn_norm": (hidden,), "ffn_norm": (hidden,),
              "ffn_gate_inp": (experts, hidden), "token_embd": None}  # fmt: skip
    wrong = []
    for spec in specs.values():
        shape = wanted.get(BLOCK.sub("", spec.name).removesuffix(".weight"))
        if shape is not None and spec.shape != shape:
            wrong.append(f"{spec.name} {list(spec.shape)}, not {list(shape)}")
    if EMBEDDING in specs and specs[EMBEDDING].shape[1:] != (hidden,):
        wrong.append(f"{EMBEDDING} {list(specs[EMBEDDING].shape)}, not rows of {hidden}")
    if wrong:
        yield fault(
            ENGINE,
            f"{counted(len(wrong), 'tensor has another shape', 'tensors have other shapes')} than the metadata says:"
            f" {some(wrong)}",
            "fails: the tensor has the wrong shape", AGAIN,
        )  # fmt: skip
