"""The layout of llama.cpp: GGUF's names, stacked experts, the row order of its rotary embeddings, metadata as config.

It takes transformers' checkpoints of the architectures in loaders/architectures/gguf.py. From another GGUF everything
stays as it is except the types of tensors that are quantized, and its metadata is carried over. There is no
config.json: the one file, MODEL-TYPE.gguf, holds everything. Split, there is a file for each unit, after a first one
that holds only the metadata.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar

from loaders.architectures.gguf import Architecture, GgufName, architecture_of, completed, experts_of
from loaders.architectures.gguf_types import is_float32
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import gguf
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.layouts.base import Assembly, Joined, Naming, Placed
from loaders.layouts.gguf.extra_tensors import extra_tensors
from loaders.layouts.gguf.metadata import (
    FILE_TYPES,
    general_metadata,
    model_metadata,
    not_computed,
    quantization_metadata,
)
from loaders.layouts.gguf.wholes import Whole, is_part, wholes
from loaders.limits import shown
from loaders.quantization.read_only.ggml import check_readable
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.ggml import Ggml
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Decision, Rule, dropping
from loaders.specs import OutputFile, StoredSpec, StoredTensor
from loaders.tensors.encoding import Encoding
from loaders.tensors.formed import Forms
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.repacked import holds_mxfp4
from loaders.words import counted

ENGINES = ("ggml", "plain")
LEGAL = ("LICENSE", "NOTICE", "COPYING")  # how the names begin of the source's files that are copied
SPLIT_KEYS = (gguf.SPLIT_NUMBER, gguf.SPLIT_COUNT, gguf.SPLIT_TENSORS)
EMBEDDING = "token_embd.weight"
BLOCK = re.compile(r"blk\.(\d+)\.")
INTEGERS = ("I32",)  # tables of numbers, such as DeepSeek V4's experts by token
FLOATS = ("F32", "F16", "BF16")


class GgufLayout:
    """The layout of llama.cpp; see `Layout` and `Assembling`."""

    name: ClassVar[str] = "gguf"
    containers: ClassVar[tuple[str, ...]] = ("gguf",)
    file: ClassVar[str | None] = None

    def formed(self, checkpoint: Checkpoint, tensors: Sequence[LogicalTensor]) -> Sequence[LogicalTensor]:
        if checkpoint.container == "gguf":
            return tensors
        forms = Forms(architecture_of(checkpoint.config).forms, completed(checkpoint.config), floats="F32")
        return [piece for tensor in tensors for piece in forms.of(tensor)]

    def left_out(self, checkpoint: Checkpoint) -> tuple[Rule, ...]:
        if checkpoint.container == "gguf":
            return ()
        return dropping(architecture_of(checkpoint.config).dropped(checkpoint.config))

    def no_next_tokens(self, checkpoint: Checkpoint) -> str | None:
        architecture = architecture_of(checkpoint.config)
        if architecture.next_tokens:
            return None
        return f"llama.cpp's converter writes no layers for multi-token prediction for {architecture.name}"

    def place(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> tuple[Placed, ...]:
        for decision in decisions:
            if decision.scheme is not None and decision.scheme.engine not in ENGINES:
                raise BadSpec(
                    f"{setting('layout')}: GGUF holds ggml's types, not {decision.scheme.kind}; choose a quant of"
                    " gguf_*, or"
                    " another layout"
                )
        if checkpoint.container == "gguf":
            return tuple(_as_it_is(d) for d in decisions if d.scheme is not None)
        return _Converting(checkpoint, decisions).place()

    def config(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None
    ) -> dict[str, Any] | None:
        return None

    def about(self, checkpoint: Checkpoint, placed: Sequence[Placed]) -> Any:
        return None

    def index(self, files: Sequence[OutputFile], total_bytes: int, parameters: int) -> Mapping[str, Any] | None:
        return None

    def warnings(self, decisions: Sequence[Decision]) -> tuple[str, ...]:
        again = [d for d in decisions if d.action == "quantize" and d.tensor.dtype.block > 1]
        if not again:
            return ()
        types = ", ".join(sorted({d.tensor.dtype.name for d in again}))
        return (
            f"{counted(len(again), 'tensor is', 'tensors are')} quantized already in the source ({types}) and"
            " quantized again, from what they decode to, as llama-quantize --allow-requantize does: more is lost than"
            " from the weights they came from",
        )

    def aux(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        return tuple(name for name in checkpoint.aux if name.upper().startswith(LEGAL))

    def assemble(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], files: Sequence[OutputFile], naming: Naming
    ) -> Assembly:
        is_copy = checkpoint.container == "gguf" and all(d.scheme in (None, Plain()) for d in decisions)
        label = naming.label or (_own_label(checkpoint) if is_copy else None) or _label(files)
        if label in FLOATS and any(slot.dtype.name == "MXFP4" for file in files for slot in file.slots):
            label = "MXFP4_MOE"
        stem = f"{naming.model}-{label}"
        metadata, notes = _metadata(checkpoint, files, naming.model, None if is_copy else label)
        metadata |= naming.metadata
        tensors = sum(len(file.slots) for file in files)
        if naming.split:
            count = len(files) + 1
            names = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
            whole = tuple(
                gguf.with_head(replace(file, name=names[number]), gguf.split_metadata(number, count, tensors))
                for number, file in enumerate(files, 1)
            )
            first = gguf.header(metadata | gguf.split_metadata(0, count, tensors), [])
            return Assembly(whole, {names[0]: first}, None, notes)
        starts = list(accumulate((file.data_bytes for file in files), initial=0))
        places = [(slot, at + slot.offset) for at, file in zip(starts, files, strict=False) for slot in file.slots]
        joined = Joined(f"{stem}.gguf", gguf.header(metadata, places))
        pieces = tuple(
            replace(file, name=f"{joined.name}.{number:05d}", within=(joined.name, len(joined.head) + at))
            for number, (at, file) in enumerate(zip(starts, files, strict=False), 1)
        )
        return Assembly(pieces, {}, joined, notes)


def _as_it_is(decision: Decision) -> Placed:
    """Place a tensor of one GGUF in another: it is copied, or quantized again from what its blocks decode to."""
    encoding, tensor = decision.encoding, decision.tensor
    assert encoding is not None
    if isinstance(encoding.scheme, Plain) and is_float32(tensor.name, len(tensor.shape)):
        # llama.cpp needs vectors and some others in float32, whatever is asked for the rest.
        encoding = replace(encoding, scheme=Plain())
    if encoding.scheme == Plain():
        encoding = replace(encoding, action="keep")
    elif tensor.dtype.block > 1:
        check_readable(tensor.dtype.name)
        encoding = replace(encoding, cast=DTYPES["F32"])
    return Placed(encoding, {role: StoredTensor(tensor.name, part) for role, part in encoding.stored.items()})


class _Converting:
    """A checkpoint of transformers on its way to GGUF."""

    def __init__(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> None:
        self._config = completed(checkpoint.config)
        self._architecture: Architecture = architecture_of(checkpoint.config)
        self._experts = experts_of(self._config)
        self._decisions = [d for d in decisions if d.scheme is not None and d.tensor.role != "buffer"]

    def place(self) -> tuple[Placed, ...]:
        """Place all tensors.

        Raises:
            BadSpec: a tensor has no place in the architecture, or a stack of experts is not whole.
        """
        names = {d.tensor.name: self._architecture.gguf_name(d.tensor.name) for d in self._decisions}
        unknown = [name for name, found in names.items() if found is None]
        if unknown:
            raise BadSpec(
                f"{setting('layout')}: llama.cpp's {self._architecture.name} has no place for"
                f" {counted(len(unknown), 'tensor')}"
                f" ({', '.join(unknown[:4])}); drop them by a rule if the model works without"
            )
        known = [(d, name) for d in self._decisions if (name := names[d.tensor.name]) is not None]
        encodings = [(name, self._encoding(d, name)) for d, name in known]
        whole = wholes([(name, encoding) for name, encoding in encodings if is_part(name)], self._experts)
        return self._with_extras([self._placed(name, encoding, whole) for name, encoding in encodings])

    def _encoding(self, decision: Decision, name: GgufName) -> Encoding:
        source = decision.tensor
        scheme, action = _type_for(decision, name, self._architecture)
        order = self._architecture.row_order(source.name, source.shape[0], self._config, inverse=False)
        return Encoding(tensor=source, action=action, scheme=scheme, order=order)

    def _placed(self, name: GgufName, encoding: Encoding, whole: Mapping[str, Whole]) -> Placed:
        [(role, part)] = encoding.stored.items()
        tensor = StoredTensor(name.name, part)
        if name.name in whole:
            found = whole[name.name]
            tensor = StoredTensor(name.name, part, found.spec, found.offset(name))
        return Placed(encoding, {role: tensor})

    def _with_extras(self, placed: list[Placed]) -> tuple[Placed, ...]:
        """Add the constants that no tensor of the source becomes to what the embedding stores."""
        extras = extra_tensors(self._architecture, self._config)
        if not extras:
            return tuple(placed)
        stored = {
            name.removesuffix(".weight"): StoredTensor(name, StoredSpec(DTYPES["F32"], data.shape, data.tobytes()))
            for name, data in extras.items()
        }
        return tuple(
            replace(p, stored={**p.stored, **stored}) if p.stored["weight"].name == EMBEDDING else p for p in placed
        )


def _type_for(decision: Decision, name: GgufName, architecture: Architecture) -> tuple[Scheme, str]:
    """Return the scheme and action for a tensor: some are float32, whatever is asked for the others."""
    tensor, scheme = decision.tensor, decision.scheme
    assert scheme is not None
    if tensor.dtype.name in INTEGERS:
        return Plain(), "keep"
    shape = tensor.shape if name.expert is None else (2, *tensor.shape)  # a stack of some experts
    if architecture.is_float32(name.name, len(shape)) and (
        isinstance(scheme, Plain) or not architecture.is_quantized(name.name, shape)
    ):
        scheme = Plain() if tensor.dtype.name == "F32" and isinstance(scheme, Plain) else Plain("F32")
    elif scheme == Plain() and holds_mxfp4(tensor):
        return Ggml("MXFP4"), "quantize"
    elif isinstance(scheme, Plain) and scheme.dtype is None and tensor.dtype.name not in FLOATS:
        scheme = Plain("F32")
    refusal = scheme.refuses(tensor.spec)
    if refusal:
        raise BadSpec(f"{tensor.name}: it cannot be in a GGUF: {refusal}")
    if isinstance(scheme, Plain):
        return scheme, "keep" if scheme.dtype in (None, tensor.dtype.name) else "cast"
    return scheme, decision.action


# The file type that llama.cpp guesses where most tensors are of a type that several file types have.
GUESSED = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def _label(files: Sequence[OutputFile]) -> str:
    """Return the file type of the type in which most bytes are stored, where a job does not give a label."""
    counts = Counter[str]()
    for file in files:
        for slot in file.slots:
            label = GUESSED.get(slot.dtype.name, slot.dtype.name)
            if label in FILE_TYPES:
                counts[label] += slot.size
    return counts.most_common(1)[0][0] if counts else "F32"


def _own_label(checkpoint: Checkpoint) -> str | None:
    """Return the name of the file type that a GGUF states in its metadata, or None."""
    found = gguf.read_metadata(checkpoint.source, checkpoint.files[0].name).get("general.file_type")
    return next((label for label, number in FILE_TYPES.items() if found is not None and number == found.value), None)


def _next_tokens(architecture: Architecture, files: Sequence[OutputFile]) -> int:
    """Return how many layers for multi-token prediction are written: those after the model's own."""
    layers = (BLOCK.match(slot.name) for file in files for slot in file.slots)
    last = max((int(layer[1]) for layer in layers if layer), default=0)
    return max(0, last + 1 - architecture.layers)


def _metadata(
    checkpoint: Checkpoint, files: Sequence[OutputFile], model: str, label: str | None
) -> tuple[dict[str, gguf.MetadataValue], tuple[str, ...]]:
    """Make the metadata, and notes on what they do not hold.

    `label` is the name of the file type, or None for a copy of a GGUF, whose own stays.
    """
    if checkpoint.container == "gguf":
        found = gguf.read_metadata(checkpoint.source, checkpoint.files[0].name)
        # The output is aligned to the default, so that another alignment of the source's must not be carried over.
        is_usual = found.get(gguf.ALIGNMENT_KEY, gguf.uint32(0)).value == gguf.ALIGNMENT
        dropped = SPLIT_KEYS if is_usual else (*SPLIT_KEYS, gguf.ALIGNMENT_KEY)
        kept = {key: entry for key, entry in found.items() if key not in dropped}
        return (kept if label is None else kept | quantization_metadata(label)), ()
    # Tokenizers and model cards are of no interest to the plan of another layout, and many modules.
    from loaders.layouts.gguf.generation import read_generation, sampling_metadata
    from loaders.layouts.gguf.keys.pooling import pooling_metadata
    from loaders.layouts.gguf.model_card import card_of, model_card_metadata
    from loaders.layouts.gguf.tokenizers.tokenizer import tokenizer_metadata

    assert label is not None
    architecture = architecture_of(checkpoint.config)
    rows = next((slot.shape[0] for file in files for slot in file.slots if slot.name == EMBEDDING), None)
    if rows is None:
        raise BadSpec(f"{setting('layout')}: a GGUF needs {EMBEDDING}, and there is no model.embed_tokens.weight")
    config = {**completed(checkpoint.config), "vocab_size": rows}
    tensors = [(slot.name, slot.shape) for file in files for slot in file.slots]
    try:
        tokenizer, left_out = tokenizer_metadata(checkpoint.source, checkpoint.config, rows)
        pooling, modules = pooling_metadata(checkpoint.source, architecture.name)
        made = {
            **general_metadata(architecture.name, label),
            **model_card_metadata(card_of(checkpoint.source), checkpoint.config, model, tensors),
            **sampling_metadata(read_generation(checkpoint.source)),
            **model_metadata(architecture, config, _next_tokens(architecture, files)),
            **pooling,
            **tokenizer,
        }
    except UnicodeEncodeError as error:
        raise _no_text(error, "tokenizer") from None
    _check_texts(made)
    notes = [f"a GGUF has no place for {each}" for each in (*left_out, *modules)]
    return made, (*not_computed(architecture, config, made), *notes)


# The files that metadata come from, by how their keys begin; the first that fits counts.
SOURCES = (
    ("tokenizer.chat_template", "the chat template"),
    ("tokenizer", "tokenizer.json, or a file of the tokenizer beside it"),
    ("general", "README.md, the model card"),
    ("", "config.json"),
)


def _check_texts(metadata: gguf.Metadata) -> None:
    """Raise BadCheckpoint if a text is none in UTF-8: JSON and YAML can name halves of characters alone."""
    for key, entry in metadata.items():
        if entry.type == gguf.STRING:
            try:
                "".join(entry.value).encode()
            except UnicodeEncodeError as error:
                raise _no_text(error, key) from None


def _no_text(error: UnicodeEncodeError, key: str) -> BadCheckpoint:
    where = next(file for start, file in SOURCES if key.startswith(start))
    found = shown(error.object[max(0, error.start - 8) : error.end + 8])
    return BadCheckpoint(
        f"{where}: a text has half of a character, {error.object[error.start]!r} in {found}, which UTF-8, and so"
        " a GGUF, cannot hold; correct it, or fetch the file again"
    )
