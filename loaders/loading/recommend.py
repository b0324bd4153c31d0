"""Recommendations for loading a model: the preset that fits a memory, the strategy, the worker count, and why."""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loaders.architectures.family import text_config
from loaders.backends.devices import NAMES, Backend, backend, best
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import dtype_named
from loaders.errors import BadCheckpoint, BadSpec
from loaders.faults import not_positive
from loaders.layouts import BY_ENGINE, LAYOUTS, Forming
from loaders.layouts.engines import wants_stacks
from loaders.layouts.rules import layout_rules
from loaders.loading.config import LoadConfig
from loaders.loading.load import open_weights
from loaders.near_misses import near
from loaders.presets.catalog import preset
from loaders.presets.settings import Quant
from loaders.quantization.schemes.plain import Plain
from loaders.rules.decide import decide
from loaders.rules.kept import cast_kept, declared_in, usual_dtype
from loaders.specs import TensorSpec
from loaders.storage import local
from loaders.strategies.auto import choose
from loaders.tensors.sources import Sources, tensors_of

GB = 1_000_000_000
# By backend, the presets that its engines load, from most bits per weight to fewest; the first that fits is taken.
PRESETS = {
    "cuda": ("none", "int8", "nf4", "w4a16", "hqq3", "hqq2"),  # w4a16 quantizes experts, which bitsandbytes does not
    "cpu": ("none", "gguf_q8_0", "gguf_q6_k", "gguf_q5_k_m", "gguf_q4_k_m"),
    "mps": ("none", "hqq8", "hqq4", "hqq3", "hqq2"),
    "mlx": ("none", "mlx_int8", "mlx_mixed_4_6", "mlx_int4"),
}
# Assumed bytes of the libraries, their kernels and (with CUDA) the context. Round figures, on the safe side: too much
# costs a few bits per weight, too little an out-of-memory error.
RUNTIME_BYTES = {
    "cuda": 1 * GB,
    "cpu": GB // 2,
    "mps": GB // 2,
    "mlx": GB // 2,
}
CACHE_ITEM_BYTES = 2  # bytes of a number in the cache of keys and values, which engines hold in 16 bits by default
CHUNK_TOKENS = 2048  # tokens of a prompt that go through the model at once, as llama.cpp's n_batch is by default
UNKNOWN_RESERVE = 0.2  # the share of the memory left free if no config tells how large keys and values are
# A typical large matrix, which stands for the whole model where only its number of parameters is known.
LARGE = TensorSpec("model.layers.0.mlp.up_proj.weight", dtype_named("BF16"), (4096, 4096))


@dataclass(frozen=True, slots=True)
class FittedPreset:
    """A preset applied to the model. `weight_bytes` is None if the preset cannot take it.

    `why` then gives the reason, and otherwise how the size was found.
    """

    preset: str
    weight_bytes: int | None
    bits_per_weight: float | None
    fits: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """A recommendation. `scheme` is None if nothing fits; `arithmetic` is the derivation, one line per step.

    It can be passed on as the config of `load_model_and_tokenizer` and `ModelLoaderFactory`. `model_name`: where the
    checkpoint is; None if only a number of parameters was given.
    """

    scheme: str | None
    strategy: str
    workers: int
    backend: str
    available_bytes: int
    reserve_bytes: int
    candidates: tuple[FittedPreset, ...]
    arithmetic: tuple[str, ...]
    model_name: str | None = None

    def load_config(self) -> LoadConfig:
        """Return the settings for `load_and_quantize`, which loads to the CPU.

        Raises:
            BadSpec: nothing fits.
        """
        if self.scheme is None:
            raise BadSpec(f"nothing fits: {self.arithmetic[-1]}")
        return LoadConfig(quantize=None if self.scheme == "none" else self.scheme, strategy=self.strategy)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "model_name"}

    def __str__(self) -> str:
        return "\n".join(self.arithmetic)


def get_recommended_loader_config(
    model: str | os.PathLike[str] | Checkpoint | int,
    backend: str = "auto",
    available_memory_gb: float | None = None,
    *,
    context_tokens: int = 8192,
) -> Recommendation:
    """Recommend a preset, a strategy and a number of workers for a model, a device and its memory.

    model: a folder or file of weights, whose sizes are planned exactly from headers, or a number of parameters, whose
    sizes are estimated. available_memory_gb: gigabytes (1e9 bytes); by default the free memory. context_tokens: the
    length of one sequence whose keys and values must fit besides the weights, as far as the model has positions. With a
    memory given, the backend need not exist on this machine.

    Raises:
        BadSpec: the backend is unknown, or absent and no memory is given; or a number is not positive.
        BadCheckpoint: the checkpoint is damaged.
    """
    for name, number in (("available_memory_gb", available_memory_gb), ("context_tokens", context_tokens)):
        whole = name == "context_tokens"
        if number is not None and (wrong := not_positive(name, number, whole=whole)) is not None:
            raise BadSpec(wrong)
    device = _device(backend, available_memory_gb)
    checkpoint = None if isinstance(model, int) else model if isinstance(model, Checkpoint) else open_weights(model)
    reserve, said = _reserve(checkpoint, device, context_tokens)
    room = device.free_bytes - reserve
    lines = [f"{_gb(device.free_bytes)} for {device.name} ({device.description})", *said]
    lines += [f"room for weights: {_gb(device.free_bytes)} - {_gb(reserve)} = {_gb(room)}"]
    candidates: list[FittedPreset] = []
    known: dict[tuple[bool, bool], Sources] = {}
    for name in PRESETS[device.name]:
        candidates.append(_candidate(name, model if isinstance(model, int) else checkpoint, room, known))
        lines.append(_said(candidates[-1], room))
    chosen = next((each.preset for each in candidates if each.fits), None)
    strategy, why = ("auto", "no files to look at") if checkpoint is None else _strategy(checkpoint, device)
    medium = "local" if checkpoint is None else _medium(checkpoint)
    workers = device.workers(strategy, medium)
    lines += [f"strategy {strategy}: {why}", f"workers: {workers}, to begin with, from {medium} storage"]
    most = 0 if chosen is not None else _tokens_that_fit(checkpoint, device, candidates, context_tokens)
    lines.append(_verdict(chosen, candidates, room, most))
    return Recommendation(
        scheme=chosen,
        strategy=strategy,
        workers=workers,
        backend=device.name,
        available_bytes=device.free_bytes,
        reserve_bytes=reserve,
        candidates=tuple(candidates),
        arithmetic=tuple(lines),
        model_name=None if checkpoint is None else str(checkpoint.address),
    )


def _device(name: str, memory_gb: float | None) -> Backend:
    if name not in (*NAMES, "auto"):
        raise BadSpec(f"backend: unknown {name!r}{near(str(name), NAMES)}; known: {', '.join(NAMES)}, auto")
    name = best() if name == "auto" else name
    if memory_gb is None:
        return backend(name)
    total = round(memory_gb * GB)
    return Backend(name, (name,), "as given", total, total)


def _reserve(checkpoint: Checkpoint | None, device: Backend, tokens: int) -> tuple[int, list[str]]:
    """Return the bytes needed besides the weights, and their derivation."""
    runtime = RUNTIME_BYTES[device.name]
    sizes = None if checkpoint is None else _sizes(checkpoint.config)
    if sizes is None:
        share = int(UNKNOWN_RESERVE * device.free_bytes)
        return runtime + share, [
            f"assumed beside weights: {_gb(runtime)} of runtime, and {_gb(share)}, {UNKNOWN_RESERVE:.0%} of the memory:"
            " no config says how large keys, values and activations are"
        ]
    layers, hidden, inner, vocabulary = sizes
    assert checkpoint is not None
    kept, said = _kept(checkpoint.config, layers, device)
    positions = text_config(checkpoint.config, "max_position_embeddings")
    limit = ""
    if isinstance(positions, int) and 0 < positions < tokens:
        tokens, limit = positions, f"; the model has no more than {positions} positions"
    cache = kept * tokens * CACHE_ITEM_BYTES
    chunk = min(tokens, CHUNK_TOKENS)
    active = chunk * (8 * hidden + 3 * inner) * 2 + vocabulary * 4
    return runtime + cache + active, [
        f"assumed, keys and values: {said} x {tokens} tokens x {CACHE_ITEM_BYTES} bytes = {_gb(cache)} (one"
        f" sequence{limit})",
        f"assumed, activations: {chunk} tokens x (8 x {hidden} + 3 x {inner}) x 2 bytes, and {vocabulary} logits ="
        f" {_gb(active)}",
        f"assumed, runtime: {_gb(runtime)}",
    ]


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """Return layers, hidden size, intermediate size and vocabulary of a config; None if it lacks one of them."""
    try:
        layers, hidden, heads = (
            int(text_config(config, key)) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
        inner = int(text_config(config, "intermediate_size") or 4 * hidden)
        return (layers, hidden, inner, int(text_config(config, "vocab_size"))) if heads > 0 else None
    # A key is missing (None) or no number: the sizes are not known.
    except (TypeError, ValueError):
        return None


def _kept(config: Mapping[str, Any], layers: int, device: Backend) -> tuple[int, str]:
    """Return the numbers in the cache of keys and values per token, and their derivation.

    With DeepSeek's latent attention, llama.cpp and mlx-lm keep the latent vector and one rotary key, while transformers
    keeps the keys and values that every head derives from them.
    """
    heads = int(text_config(config, "num_attention_heads"))
    latent = [
        text_config(config, key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    ]
    if all(isinstance(each, int) and each > 0 for each in latent):
        rank, rotary, plain, value = latent
        if device.name in ("cpu", "mlx"):
            return layers * (rank + rotary), f"{layers} layers x ({rank} + {rotary})"
        said = f"{layers} layers x {heads} heads x ({plain} + {rotary} + {value})"
        return layers * heads * (plain + rotary + value), said
    head = _largest(text_config(config, "head_dim")) or int(text_config(config, "hidden_size")) // heads
    width = (_largest(text_config(config, "num_key_value_heads")) or heads) * head
    return 2 * layers * width, f"2 x {layers} layers x {width}"


def _largest(value: Any) -> int:
    """Return a size, or the largest where a list has one for each layer; 0 if there is none."""
    return max((int(each) for each in (value if isinstance(value, list | tuple) else [value]) if each), default=0)


def _candidate(
    name: str, model: Checkpoint | int | None, room: int, known: dict[tuple[bool, bool], Sources]
) -> FittedPreset:
    quant = preset(name)
    try:
        if isinstance(model, int):
            size, bits = _estimated(quant, model)
            return FittedPreset(name, size, bits, size <= room, "estimated from the number of parameters")
        assert model is not None
        size, parameters = planned_bytes(model, quant, known)
        return FittedPreset(name, size, size * 8 / max(1, parameters), size <= room, "planned from headers")
    except (BadSpec, BadCheckpoint) as error:
        return FittedPreset(name, None, None, False, str(error).splitlines()[0])


def planned_bytes(
    checkpoint: Checkpoint, quant: Quant, known: dict[tuple[bool, bool], Sources] | None = None
) -> tuple[int, int]:
    """Return the bytes of all tensors under a preset, as a job would store them, and the number of weights in them.

    The bytes are an upper bound where a length depends on values. `known` keeps the checkpoint's logical tensors from
    one preset to the next.

    Raises:
        BadSpec: the preset cannot take this checkpoint.
    """
    scheme = quant.scheme
    family, layout = checkpoint.family, LAYOUTS[BY_ENGINE[scheme.engine]]
    # As jobs do: a GGUF is decoded for all layouts but its own, and another source for all schemes but none.
    decode = layout.name != "gguf" if checkpoint.container == "gguf" else scheme != Plain()
    how, known = (decode, not wants_stacks(scheme.engine, family)), {} if known is None else known
    if how not in known:
        known[how] = tensors_of(checkpoint, decode=how[0], split=how[1])
    sources = known[how]
    tensors = layout.formed(checkpoint, sources.tensors) if isinstance(layout, Forming) else sources.tensors
    rules = layout_rules(layout, checkpoint, tensors, scheme, quant.mix)
    dtype = usual_dtype(checkpoint, scheme, is_decoded=decode)
    decisions = cast_kept(decide(tensors, scheme, (), rules, kept_dtype=dtype), dtype)
    placed = layout.place(declared_in(checkpoint, dtype), decisions)
    size = sum(tensor.spec.size for each in placed for tensor in each.stored.values())
    return size, sources.parameters


def _estimated(quant: Quant, parameters: int) -> tuple[int, float]:
    """Estimate bytes and bits per weight as if every parameter were in one large matrix."""
    stored = quant.scheme.stored(LARGE)
    bits = 8 * sum(part.size for part in stored.values()) / LARGE.numel
    return int(parameters * bits / 8), bits


def _medium(checkpoint: Checkpoint) -> str:
    """Return the medium that a checkpoint is stored on, as `local.medium`; "object" for stores that are not local."""
    path = checkpoint.source.store.local_path("")
    return "object" if path is None else local.medium(path)


def _strategy(checkpoint: Checkpoint, device: Backend) -> tuple[str, str]:
    if device.name in ("mps", "mlx") and _medium(checkpoint) in ("local", "memory"):
        return "unified_memory", "the device shares the CPU's memory: a map of the files is all it needs"
    return choose(checkpoint.source, [tag.name for tag in checkpoint.files], device.device)


def _said(each: FittedPreset, room: int) -> str:
    if each.weight_bytes is None:
        return f"  {each.preset}: cannot be: {each.why}"
    relation = "<=" if each.fits else ">"
    return (
        f"  {each.preset}: {_gb(each.weight_bytes)} ({each.bits_per_weight:.2f} bits per weight, {each.why}) {relation}"
        f" {_gb(room)}"
    )


def _tokens_that_fit(
    checkpoint: Checkpoint | None, device: Backend, candidates: Sequence[FittedPreset], tokens: int
) -> int:
    """Return the most of these tokens with which the smallest preset fits; 0 if fewer tokens do not help."""
    least = min((each.weight_bytes for each in candidates if each.weight_bytes is not None), default=None)
    if least is None:
        return 0
    room = device.free_bytes - least
    fewer = range(1, min(tokens, sys.maxsize))
    return bisect_right(fewer, room, key=lambda count: _reserve(checkpoint, device, count)[0])


def _verdict(chosen: str | None, candidates: Sequence[FittedPreset], room: int, tokens: int) -> str:
    """Say what was chosen, or what is lacking; `tokens` are the most that would fit, or 0."""
    if chosen is not None:
        bits = {each.preset: each.bits_per_weight or 0.0 for each in candidates if each.fits}
        if max(bits.values()) > bits[chosen]:
            return f"scheme {chosen}: as the source stores it, which fits; more bits per weight bring nothing back"
        return f"scheme {chosen}: the most bits per weight that fit"
    known = [each.weight_bytes for each in candidates if each.weight_bytes is not None]
    if not known:
        return "nothing fits: no preset can take this checkpoint"
    fewer = f", or at most context_tokens={tokens}" if tokens else ""
    return f"nothing fits: it takes {_gb(min(known) - room)} more memory{fewer}"


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB" if abs(size) >= GB // 10 else f"{size / 1e6:.2f} MB"
