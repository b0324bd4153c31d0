"""`load_weights`: loads the weights of any checkpoint into memory: as stored, cast, decoded or quantized on the way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.architectures.gguf import is_known
from loaders.backends import may_differ, offered
from loaders.backends.arrays import as_torch
from loaders.backends.devices import torch_device
from loaders.backends.memory import PeakMemory
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.file_lists import Given, open_weights
from loaders.dtypes import DTYPES, WEIGHT_DTYPES, storage_of
from loaders.errors import BadSpec, VerifyFailed, setting
from loaders.layouts import BY_ENGINE, LAYOUTS, WHOLE_STACKS, Placed
from loaders.layouts.mlx import stored_part
from loaders.loading.cache import WeightCache
from loaders.loading.checks import validate_weight_shapes
from loaders.loading.config import LoadConfig, WeightLoaderConfig, aggressively, load_config, matches
from loaders.loading.encode import MadeTensors, WantedTensor, make
from loaders.loading.quantized_tensor import QuantizedTensor, float_dtype
from loaders.loading.resources import shared
from loaders.loading.statistics import Statistics
from loaders.presets.settings import GgmlQuant, Quant
from loaders.quantization.gate import Gate
from loaders.quantization.schemes.plain import Plain
from loaders.rules.decide import decide
from loaders.rules.llama_cpp import GgmlMix, fallback_notes
from loaders.rules.refusals import ragged_notes
from loaders.rules.rule import Decision, Mix, Rule
from loaders.specs import WeightSpec
from loaders.stats import CompressionStats, ErrorSums, LayerStats, LoadStats, sums_json, sums_of
from loaders.storage.hashes import text_digest
from loaders.strategies import WeightLoader, loader
from loaders.strategies.base import by_warmth, cached_share
from loaders.tensors.quantized_sources import check_decodable
from loaders.tensors.sources import tensors_of

if TYPE_CHECKING:
    from loaders.loading.recommend import Recommendation

CACHE_FORMAT = 2  # part of every key: raised when the same request would give other parts, so that old entries miss
Weights = dict[str, Any]  # torch tensors; QuantizedTensor where a scheme made one


def load_weights(
    path: Given,
    quantize: str | bool | Quant | None = None,
    layer_filter: str | Sequence[str] | bool | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    *,
    aggressive: bool = False,
    **settings: Any,
) -> tuple[Weights, Statistics]:
    """Load the weights of a file or folder of any container, as torch tensors by name; returns them with statistics.

    path: a folder, one file, a list of files, an address or a Checkpoint, as `WeightLoader.iterate_weights` takes them.
    quantize: a preset ("nf4", "hqq4", "w4a16", "mlx_int4", "gguf_q4_k_m", ...), or what `preset` made of one, or True:
    nf4 (in a `CheckpointLoader` True is ternary). Its engine's rules decide which tensors are quantized; those are
    returned as `QuantizedTensor`s. Weights that are quantized in the source are decoded if `quantize` or `dtype` is
    given, and returned as stored otherwise; of tied tensors, one is then returned.
    layer_filter: part of a name, a pattern with * and ?, or several; tensors that match any of them are loaded. A truth
    value in this place is `aggressive`: load_weights(path, True, True, "cpu").
    aggressive: quantize to ternary_aggressive, the smallest; `quantize` is then not given, True or "ternary".
    settings: other fields of `LoadConfig`, such as use_cache=True or strategy="multithread".

    Unchanged weights on the CPU are not copied: they are private memory maps of their file.

    Raises:
        BadSpec: the request is wrong, or cannot be done for this checkpoint or on this machine (MissingFile: no file).
        BadCheckpoint: files are damaged, or shapes are not the expected ones.
        VerifyFailed: weights are NaN or infinite, or errors exceed the limit.
        StorageError: a file cannot be read.
    """
    if isinstance(layer_filter, bool):
        layer_filter, aggressive = None, layer_filter or aggressive
    wanted = None if dtype is None else float_dtype(dtype).torch
    asked = {"layer_filter": layer_filter, "device": device, "dtype": wanted, **settings}
    return load_and_quantize(path, {"quantize": aggressively(quantize) if aggressive else quantize, **asked})


def load_and_quantize(
    path: Given, config: LoadConfig | Mapping[str, Any] | WeightLoaderConfig | Quant | Recommendation | None = None
) -> tuple[Weights, Statistics]:
    """Load weights as `load_weights` does, by a config or a mapping of its fields.

    config: also a `WeightLoaderConfig`, what `get_recommended_loader_config` gives, or a quantization alone: what
    `preset` and `create_aggressive_config` return. None is nf4.

    Raises:
        As load_weights; BadSpec: a field is unknown or wrong, all such faults at once.
    """
    checked = load_config(config)
    quant, began = checked.quant, time.perf_counter()
    checkpoint = open_weights(path)
    if quant is None and checked.dtype is None:
        weights, stats = _as_stored(checkpoint, checked)
    else:
        with PeakMemory() as memory:
            weights, stats = Loading(checkpoint, checked, quant).run()
        stats = replace(stats, load=replace(stats.load, peak_anonymous_bytes=memory.peak_bytes))
    if checked.check_finite:
        _check_finite(weights)
    return weights, replace(stats, load=replace(stats.load, wall_s=time.perf_counter() - began))


def clear_cache(cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Remove what loads with use_cache=True left on disk, in a folder or where `configure` says; returns the bytes that
    were freed.

    Raises:
        StorageError: a file cannot be removed.
    """
    return cache_in(cache_dir).clear()


def cache_in(folder: str | os.PathLike[str] | None) -> WeightCache:
    """Return the cache in a folder; None is that of the process."""
    return shared().cache if folder is None else WeightCache(Path(folder))


def _none_matches(config: LoadConfig, names: Sequence[str]) -> BadSpec:
    return BadSpec(f"layer_filter: {config.layer_filter!r} matches none of {len(names)} tensors, such as {names[0]!r}")


def _as_stored(checkpoint: Checkpoint, config: LoadConfig) -> tuple[Weights, Statistics]:
    names = [spec.name for spec in checkpoint.weights]
    wanted = [name for name in names if matches(name, config.layer_filter)]
    if not wanted:
        raise _none_matches(config, names)
    _check_shapes(config, [spec for spec in checkpoint.weights if spec.name in set(wanted)])
    strategy = loader(config.strategy)
    weights = strategy.load_weights(checkpoint, names=wanted, device=config.device)
    notes = ("quantized in the source: weights are as stored; dtype or quantize decodes them",)
    specs = [spec for spec in checkpoint.weights if spec.name in weights]
    size = sum(spec.size for spec in specs)
    sizes = CompressionStats(
        tensors=len(specs),
        parameters=sum(spec.numel() for spec in specs),
        source_bytes=size,
        output_bytes=size,
    )
    said = notes if checkpoint.quantized_by is not None else ()
    return weights, Statistics(strategy.stats, notes=said, sizes=sizes)


def _check_shapes(config: LoadConfig, found: Sequence[Any]) -> None:
    if config.expected_shapes is not None:
        expected = {n: s for n, s in config.expected_shapes.items() if matches(n, config.layer_filter)}
        validate_weight_shapes(found, expected)


def _check_finite(weights: Weights) -> None:
    import torch

    wrong = [
        f"{name}: {count} NaN or infinite weights"
        for name, weight in weights.items()
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.element_size() > 1
        for count in (int((~torch.isfinite(weight)).sum()),)
        if count
    ]
    if wrong:
        raise VerifyFailed("\n".join([*wrong, "mend the source, or load it without check_finite"]))


class Loading:
    """One load that casts, decodes or quantizes weights.

    `own_rules` go before the engine's; `strategy` reads in place of the config's, and `on_done` hears of each tensor
    that was made: for weights that lie in no file. `decisions` say what becomes of each tensor.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LoadConfig,
        quant: Quant | None,
        *,
        own_rules: Sequence[Rule] = (),
        strategy: WeightLoader | None = None,
        on_done: Callable[[WantedTensor], None] = lambda wanted: None,
    ) -> None:
        self._own_rules, self._on_done = own_rules, on_done
        self._checkpoint = checkpoint
        self._config = config
        if config.device == "mlx":
            raise BadSpec("device: cast and quantized weights are torch's; load with device=cpu, or plainly onto mlx")
        # Raises BadSpec now if the device does not exist, and not after all the work.
        torch_device(config.device)
        if quant is not None and config.backend not in offered(quant.scheme):
            raise BadSpec(f"backend: {quant.name} runs on {', '.join(offered(quant.scheme))}, not on {config.backend}")
        if isinstance(quant, GgmlQuant) and quant.imatrix is not None:
            raise BadSpec(
                f"{setting('imatrix')}: an importance matrix names the tensors of a GGUF, which only a job (weightmill"
                " run) writes; leave it out"
            )
        self._strategy: WeightLoader = strategy or loader(config.strategy)
        if self._strategy.not_for_jobs:
            raise BadSpec(f"strategy={config.strategy}: {self._strategy.not_for_jobs}")
        check_decodable(checkpoint)
        split = quant is not None and quant.scheme.engine not in WHOLE_STACKS
        sources = tensors_of(checkpoint, decode=True, split=split)
        self._notes = (
            *checkpoint.notes, *sources.notes, *(f"{dropped} is tied to {kept}" for kept, dropped in sources.tied),
        )  # fmt: skip
        self._items = self._selected(sources.tensors, quant)
        _check_shapes(config, [item.tensor for item in self._items])

    def _selected(self, tensors: Sequence[Any], quant: Quant | None) -> list[WantedTensor]:
        config = self._config
        scheme = Plain() if quant is None else quant.scheme
        mix = None if quant is None else quant.mix
        if self._own_rules:  # a tensor alone, of no model, whose architecture a mix would ask for
            rules: Sequence[Rule] | None = ()
        else:
            rules = None if mix is None else self._rules_of(mix, tensors)
        mine = [tensor for tensor in tensors if matches(tensor.name, config.layer_filter)]
        if not mine:
            raise _none_matches(config, [tensor.name for tensor in tensors])
        decisions = decide(mine, scheme, self._own_rules, rules)
        self.decisions = decisions
        self._notes = (*self._notes, *ragged_notes(decisions), *fallback_notes(decisions))
        placed = self._placed(decisions, quant)
        return [
            self._wanted(decision, placed.get(decision.tensor.name))
            for decision in decisions
            if decision.action != "drop"
        ]

    def _rules_of(self, mix: Mix, tensors: Sequence[Any]) -> Sequence[Rule]:
        """Return a mix's rules. llama.cpp's ask what a model is; where it does not know, names of tensors tell."""
        config = self._checkpoint.config
        if not isinstance(mix, GgmlMix) or is_known(config):
            return mix.rules(tensors, config)
        who = "no config.json says what the model is" if not config.get("model_type") else "llama.cpp has no such model"
        self._notes = (*self._notes, f"{who}: types are chosen by the names of tensors")
        return mix.rules_by_role(tensors)

    def _placed(self, decisions: Sequence[Decision], quant: Quant | None) -> dict[str, Placed]:
        """Return what the engine's layout says about each tensor: the cast before quantizing, the names of parts."""
        # GGUF's layout would refuse models without a llama.cpp architecture; its schemes take any dtype without it.
        if quant is None or BY_ENGINE[quant.scheme.engine] == "gguf":
            return {}
        if self._own_rules:
            # mlx-lm's layout knows models; the names of a module's parts are the same in all.
            encodings = [d.encoding for d in decisions if d.encoding is not None and d.encoding.scheme.engine == "mlx"]
            return {
                each.tensor.name: Placed(
                    each, {role: stored_part(each.tensor.name, role, part) for role, part in each.stored.items()}
                )
                for each in encodings
            }
        layout = LAYOUTS[BY_ENGINE[quant.scheme.engine]]
        return {placed.tensor.name: placed for placed in layout.place(self._checkpoint, decisions)}

    def _wanted(self, decision: Decision, placed: Placed | None) -> WantedTensor:
        tensor, scheme = decision.tensor, decision.scheme
        if scheme is not None and not isinstance(scheme, Plain):
            if placed is None:
                return WantedTensor(tensor=tensor, dtype=tensor.dtype, encoding=decision.encoding)
            names = {role: stored.name for role, stored in placed.stored.items() if stored.whole is None}
            return WantedTensor(tensor=tensor, dtype=tensor.dtype, encoding=placed.encoding, names=names)
        if tensor.dtype.name not in WEIGHT_DTYPES:
            return WantedTensor(tensor=tensor, dtype=tensor.dtype)
        chosen = self._config.dtype or (DTYPES[scheme.dtype].torch if scheme is not None and scheme.dtype else None)
        return WantedTensor(tensor=tensor, dtype=tensor.dtype if chosen is None else float_dtype(chosen))

    def run(self) -> tuple[Weights, Statistics]:
        used = {spec.file for item in self._items for _, spec in item.tensor.stored}
        share = cached_share(self._checkpoint.source, [tag for tag in self._checkpoint.files if tag.name in used])
        in_place = {item.tensor.stored[0][1].name: item for item in self._items if item.is_in_place}
        loaded = {}
        if in_place:
            loaded = self._strategy.load_weights(self._checkpoint, names=list(in_place), device=self._config.device)
        others = [item for item in self._items if not item.is_in_place]
        made, from_cache = self._made(others) if others else (MadeTensors(), False)
        self._judge(others, made.errors)
        weights: Weights = {}
        for item in self._items:
            name = item.tensor.name
            weights[name] = loaded[item.tensor.stored[0][1].name] if item.is_in_place else self._result(item, made)
        return weights, self._statistics(made, from_cache, share)

    def _result(self, item: WantedTensor, made: MadeTensors) -> Any:
        name, parts = item.tensor.name, made.parts[item.tensor.name]
        if item.encoding is not None:
            return QuantizedTensor(
                name=name,
                scheme=item.encoding.scheme,
                spec=item.spec,
                parts=parts,
                device=self._config.device,
                stored=item.stored,
                names=item.names,
                error=made.errors.get(name),
            )
        raw = parts["weight"].view(np.uint8)
        tensor = as_torch(
            raw, WeightSpec(name=name, dtype=item.dtype, shape=item.tensor.shape, file="", offset=0, size=raw.nbytes)
        )
        return tensor if self._config.device == "cpu" else tensor.to(torch_device(self._config.device)[1])

    def _judge(self, items: Sequence[WantedTensor], errors: Mapping[str, ErrorSums]) -> None:
        gate = Gate(self._config.allow_nonfinite, self._config.max_relative_error, "")
        faults = [
            (errors[item.tensor.name].relative_error, fault)
            for item in items
            if item.encoding is not None and item.tensor.name in errors
            for fault in (gate.fault(item.tensor.name, errors[item.tensor.name], item.encoding.scheme),)
            if fault
        ]
        if faults:
            raise VerifyFailed(max(faults)[1] + (f" (the worst of {len(faults)})" if len(faults) > 1 else ""))

    def _made(self, items: Sequence[WantedTensor]) -> tuple[MadeTensors, bool]:
        def fresh() -> MadeTensors:
            source, config = self._checkpoint.source, self._config
            return make(source, items, self._strategy, config.backend, measured=config.measure, on_done=self._on_done)

        if not self._config.use_cache:
            return fresh(), False
        cache = self._cache
        key = self._key(items)
        if (found := _from_cache(cache, key, items)) is not None:
            return found, True
        with cache.making(key):
            # Another process may have made the entry while this one waited for the lock.
            if (found := _from_cache(cache, key, items)) is not None:
                return found, True
            # Tensors that fail the gate raise here, and so never enter the cache.
            made = fresh()
            self._judge(items, made.errors)
            parts = {f"{n}|{role}": part for n, each in made.parts.items() for role, part in each.items()}
            errors = {name: sums_json(error) for name, error in made.errors.items()}
            cache.put(key, parts, {"errors": errors, "source": str(self._checkpoint.address)})
        return made, False

    @property
    def _cache(self) -> WeightCache:
        return cache_in(self._config.cache_dir)

    def _key(self, items: Sequence[WantedTensor]) -> str:
        """Return the cache key: a digest of the files' content, the config, and everything that is made of them."""
        checkpoint, cache = self._checkpoint, self._cache
        used = {spec.file for item in items for _, spec in item.tensor.stored}
        content = [(t.name, cache.content_of(checkpoint.source, t.name)) for t in checkpoint.files if t.name in used]
        config = json.dumps(checkpoint.config, sort_keys=True, default=str)
        schemes = [item.encoding.scheme for item in items if item.encoding is not None]
        backend = self._config.backend if may_differ(schemes, self._config.backend) else ""
        return text_digest(f"{CACHE_FORMAT} {content} {config} {self._config.measure} {list(items)!r}{backend}")

    def _statistics(self, made: MadeTensors, from_cache: bool, share: float | None) -> Statistics:
        items, before = self._items, self._strategy.stats
        read = sum(item.tensor.source_bytes for item in items)
        files = {spec.file for item in items for _, spec in item.tensor.stored}
        load = LoadStats(
            files=len(files), tensors=len(items), bytes=read, read_s=before.read_s + made.seconds["read_s"],
            encode_s=made.seconds["encode_s"], measure_s=made.seconds["measure_s"], **by_warmth(share, read),
        )  # fmt: skip
        layers = {
            item.tensor.name: LayerStats(
                item.encoding.scheme.kind, item.tensor.spec.numel, item.tensor.source_bytes,
                sum(part.nbytes for part in made.parts[item.tensor.name].values()),
                made.errors.get(item.tensor.name, ErrorSums(numel=item.tensor.spec.numel)),
            )
            for item in items
            if item.encoding is not None
        }  # fmt: skip
        plain = [item for item in items if item.encoding is None]
        sizes = CompressionStats(
            tensors=len(items),
            parameters=sum(item.tensor.spec.numel for item in items),
            source_bytes=read,
            output_bytes=sum(layer.output_bytes for layer in layers.values()) + sum(item.spec.size for item in plain),
            error=sum((layer.error for layer in layers.values()), ErrorSums()),
            layer_stats=layers,
        )
        notes = self._notes
        if layers and not self._config.measure:
            notes = (*notes, "errors were not measured: those of the statistics are 0")
        return Statistics(load, sizes if layers else None, from_cache, notes, sizes)


def _from_cache(cache: WeightCache, key: str, items: Sequence[WantedTensor]) -> MadeTensors | None:
    entry = cache.get(key)
    if entry is None:
        return None
    try:
        parts: dict[str, Mapping[str, np.ndarray]] = {
            item.tensor.name: {
                role: entry.parts[f"{item.tensor.name}|{role}"].view(storage_of(stored.dtype))
                for role, stored in item.stored.items()
            }
            for item in items
        }
        errors = {name: sums_of(each) for name, each in entry.about["errors"].items()}
    # A damaged or foreign entry is made anew.
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    return MadeTensors(parts, errors)


__all__ = ["LoadConfig", "Statistics", "clear_cache", "load_and_quantize", "load_weights", "open_weights"]
