"""Merging an adapter of peft into a checkpoint's tensors: which tensor each of the adapter's belongs to, and how.

The sum is computed when weights are read (see merged.py). Here names and shapes are matched, and everything that does
not fit is refused. What is computed is what peft's merge_and_unload makes of a base loaded in float32.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loaders.architectures.family import natural_key
from loaders.architectures.templates import KnownTraits
from loaders.checkpoints.adapter import Adapter
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import WEIGHT_DTYPES
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.specs import WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor, known
from loaders.tensors.lora_factors import expert_product, layer_product, parameters_of
from loaders.tensors.merged import Merge
from loaders.tensors.sources import Sources
from loaders.words import counted

# Names of modules that only hold the others. Engines and their versions differ in them: model.language_model.layers
# was language_model.model.layers, and a bare base has no `transformer.` or `model.`.
HOLDERS = ("model", "language_model", "text_model", "transformer", "base_model")
RENAMED = {"block_sparse_moe": "mlp"}  # Mixtral's experts, in transformers before version 5 and since
SHOWN = 4
COMPARE_BYTES = 4 << 20
AUX = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
AUX_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A checkpoint with the config of the merged model, and its tensors."""

    checkpoint: Checkpoint
    sources: Sources


def merge_adapter(checkpoint: Checkpoint, sources: Sources, adapter: Adapter) -> Merged:
    """Merge an adapter into the logical tensors of a checkpoint.

    Raises:
        BadSpec: the adapter cannot be merged into this checkpoint.
        BadCheckpoint: the adapter's tensors do not fit the checkpoint's, or its config.
    """
    if any(tensor.name.startswith("blk.") for tensor in sources.tensors):
        raise BadSpec(
            f"{setting('transform')}: a GGUF that becomes another keeps its names and orders, which no adapter has;"
            f" merge with {setting('quantize')}=none and {setting('layout')}=hf first"
        )
    merging = _Merging(checkpoint, sources, adapter)
    merging.replace_full()
    merging.add_products()
    merging.set_tokens()
    merging.check_unmatched()
    merges = merging.merges
    tensors = [replace(r, merge=merges[r.name]) if r.name in merges else r for r in merging.tensors.values()]
    tensors.sort(key=lambda tensor: (natural_key(tensor.block), natural_key(tensor.name)))
    tied = tuple(pair for pair in sources.tied if pair[1] not in merging.untied)
    config = _untied(checkpoint.config) if merging.untied else checkpoint.config
    notes = (*sources.notes, *merging.notes())
    made = replace(sources, tensors=tuple(tensors), tied=tied, notes=notes, adapter=adapter.file)
    return Merged(checkpoint=replace(checkpoint, config=config), sources=made)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    made = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), Mapping) and "tie_word_embeddings" in config["text_config"]:
        made["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return made


class _Merging:
    """One merge while it is planned: what becomes of each tensor, and what has found no tensor."""

    def __init__(self, checkpoint: Checkpoint, sources: Sources, adapter: Adapter) -> None:
        self.checkpoint = checkpoint
        self.adapter = adapter
        self.tensors = {tensor.name: tensor for tensor in sources.tensors}
        self.merges: dict[str, Merge] = {}
        self.untied: list[str] = []
        self._holders = (*HOLDERS, str(checkpoint.config.get("model_type")))
        self._by_key: dict[str, list[str]] = {}
        for name in self.tensors:
            self._by_key.setdefault(self._key(name), []).append(name)
        pairs = checkpoint.family.tied_pairs(checkpoint.config)
        # The engine makes `dropped` from `kept`: both names stand for one tensor here.
        self._tied = {self._key(d): k for k, d in pairs if d not in self.tensors and k in self.tensors}
        self._dropped = {k: d for k, d in pairs if self._key(d) in self._tied}
        self._unmatched: list[str] = []
        self._ranks: Counter[int] = Counter()
        self._scalings: set[float] = set()
        self._said: list[str] = []

    # --- names

    def _key(self, name: str) -> str:
        """Return a name without the modules that hold the others."""
        parts = name.split(".")
        while len(parts) > 2 and parts[0] in self._holders:
            del parts[0]
        return ".".join(RENAMED.get(part, part) for part in parts)

    def find(self, name: str) -> LogicalTensor | None:
        """Return the base's tensor of a name of the adapter's; None if there is none, or it is tied to another.

        Raises:
            BadCheckpoint: several would do.
            BadSpec: it is copied as it is stored, in a quantized form.
        """
        found = [name] if name in self.tensors else self._by_key.get(self._key(name), [])
        if len(found) > 1:
            raise BadCheckpoint(f"{name}: the adapter's tensor could be {' or '.join(found)} of the base")
        if not found:
            return None
        tensor = self.tensors[found[0]]
        if tensor.dtype.name not in WEIGHT_DTYPES:
            raise BadSpec(
                f"{setting('transform')}: {tensor.name} is {tensor.dtype}, a part of a quantized weight that is copied"
                f" as it is stored; choose a quant, or give {setting('quantize')}=none a {setting('dtype')}"
            )
        return tensor

    def _is_tied(self, name: str) -> bool:
        return self._key(name) in self._tied and self.find(name) is None

    def _set(self, tensor: LogicalTensor, **change: Any) -> None:
        before = self.merges.get(tensor.name, Merge(adapter=self.adapter.file))
        self.merges[tensor.name] = replace(before, **change)

    # --- tensors that replace the base's

    def replace_full(self) -> None:
        """Take tensors that the adapter stores whole: modules_to_save, biases, embeddings."""
        later = []
        for name, spec in self.adapter.full.items():
            tensor = self.find(name)
            if tensor is not None:
                self._check_shape(spec, tensor, "it replaces")
                self._set(tensor, replaced=spec)
            elif self._is_tied(name):
                later.append((name, spec))
            else:
                self._unmatched.append(spec.name)
        for name, spec in later:
            self._replace_tied(name, spec)
        for kept, dropped in self._dropped.items():
            is_alone = self._key(dropped) not in {self._key(name) for name, _ in later}
            if is_alone and kept in self.merges and self._is_own(kept):
                # peft trains a copy of the embeddings and leaves the head the old ones.
                self._untie(kept, None)

    def _is_own(self, name: str) -> bool:
        """Whether peft makes a copy of the module that a tensor belongs to, which is then no longer tied."""
        saved = [each for each in self.adapter.full if (found := self.find(each)) and found.name == name]
        return any(self.adapter.settings.is_saved(each.rpartition(".")[0]) for each in saved)

    def _replace_tied(self, name: str, spec: WeightSpec) -> None:
        """Take a stored tensor whose counterpart in the base is tied to another."""
        kept = self.tensors[self._tied[self._key(name)]]
        self._check_shape(spec, kept, "it replaces")
        other = self.merges.get(kept.name, Merge(adapter=self.adapter.file)).replaced
        if self.adapter.settings.is_saved(name.rpartition(".")[0]) and (other is None or not self._same(spec, other)):
            self._untie(kept.name, spec)
        elif other is None:  # what peft loads into a tied weight, the other name has as well
            self._set(kept, replaced=spec)
        elif self._same(spec, other):
            self._said.append(f"{name} is stored with the same weights as {kept.name}, and stays tied to it")
        else:
            raise BadSpec(
                f"{setting('adapter')}: it stores {name} beside {kept.name}, with other weights, and the base ties"
                " them; merge it with peft (merge_and_unload)"
            )

    def _untie(self, kept: str, spec: WeightSpec | None) -> None:
        dropped = self._dropped[kept]
        made = known(replace(self.tensors[kept], name=dropped), KnownTraits(self.checkpoint.family))
        self.tensors[dropped] = made
        self._by_key.setdefault(self._key(dropped), []).append(dropped)
        self.untied.append(dropped)
        if spec is not None:
            self._set(made, replaced=spec)
        self._said.append(f"{dropped} is no longer tied to {kept}: tie_word_embeddings becomes false, as in peft")

    def _same(self, one: WeightSpec, other: WeightSpec) -> bool:
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        files = self.adapter.file.files

        def piece(spec: WeightSpec, at: int) -> memoryview:
            return files.read(spec.file, spec.offset + at, spec.offset + min(at + COMPARE_BYTES, spec.size))

        return all(piece(one, at) == piece(other, at) for at in range(0, one.size, COMPARE_BYTES))

    def _check_shape(self, spec: WeightSpec, tensor: LogicalTensor, does: str) -> None:
        if spec.shape == tensor.shape:
            return
        is_resized = len(spec.shape) == 2 and spec.shape[1:] == tensor.shape[1:]
        more = (
            "; the vocabulary was resized: resize the base as well (transformers' resize_token_embeddings), and save it"
            if is_resized
            else "; is this the adapter's base?"
        )
        raise BadCheckpoint(
            f"{spec.name} {list(spec.shape)}: {does} {tensor.name}, which has {list(tensor.shape)}{more}{self._base}"
        )

    # --- low-rank products

    def add_products(self) -> None:
        """Take the factors of linear layers, convolutions, embeddings and stacks of experts."""
        for module, parts in self.adapter.low_rank.items():
            self._check_layer(module)
            weight = self.find(f"{module}.weight")
            if weight is None and self._is_tied(f"{module}.weight"):
                weight = self.tensors[self._tied[self._key(f"{module}.weight")]]
            if weight is not None:
                self._add(module, weight, parts)
            elif not self._add_to_experts(module, parts):
                self._unmatched += [spec.name for spec in parts.values()]

    def _add(self, module: str, weight: LogicalTensor, parts: Mapping[str, WeightSpec]) -> None:
        before = self.merges.get(weight.name)
        if before is not None and before.product is not None:
            raise BadSpec(
                f"{setting('adapter')}: it has factors for {module} and for what the base ties to it,"
                f" {weight.name}; merge it with peft (merge_and_unload)"
            )
        product, rank = layer_product(self.checkpoint, self.adapter, module, weight, parts)
        self._count(module, rank, product.scaling)
        self._set(weight, product=product)
        if weight.name in self._dropped and self._dropped[weight.name] not in self.untied:
            self._said.append(
                f"{self._dropped[weight.name]} is tied to {weight.name}, so that it changes as well, as in peft's merge"
            )
        if (bias := parts.get("lora_B.bias")) is not None:
            target = self.find(f"{module}.bias")
            if target is None:
                raise BadSpec(
                    f"{setting('adapter')}: lora_bias: {bias.name} has no bias of the base to be added to; give the"
                    " base one of zeros"
                )
            self._check_shape(bias, target, "it is added to")
            self._set(target, added=(bias, product.scaling))

    def _add_to_experts(self, module: str, parts: Mapping[str, WeightSpec]) -> bool:
        """Add factors of a whole stack of experts to the stack or to the experts' tensors; False if there are none."""
        found = False
        for weight, make in parameters_of(self.checkpoint, self, self.adapter, module, parts):
            product, rank = expert_product(make, weight, parts)
            self._set(weight, product=product)
            if not found:
                self._count(module, rank, product.scaling)
            found = True
        return found

    def _count(self, module: str, rank: int, scaling: float) -> None:
        self._ranks[rank] += 1
        self._scalings.add(scaling)

    def _check_layer(self, module: str) -> None:
        layers, match = self.adapter.settings.layers, re.search(r"\.(\d+)\.", module)
        if layers is not None and match is not None and int(match[1]) not in layers:
            raise BadCheckpoint(
                f"{module}: the adapter has factors for layer {match[1]}, and its layers_to_transform names only"
                f" {', '.join(map(str, layers[:8]))}"
            )

    # --- trained tokens

    def set_tokens(self) -> None:
        """Take rows of embeddings that were trained one by one."""
        given = self.adapter.settings.tokens
        for module, spec in self.adapter.tokens.items():
            weight = self.find(f"{module}.weight")
            if weight is None:
                self._unmatched.append(spec.name)
                continue
            fitting = [v for k, v in given.items() if not k or module == k or module.endswith(f".{k}")]
            indices = fitting[0] if fitting else ()
            is_fitting = len(weight.shape) == 2 and spec.shape == (len(indices), weight.shape[1])
            if not is_fitting or max(indices) >= weight.shape[0]:
                raise BadCheckpoint(
                    f"{spec.name} {list(spec.shape)}: expected a row for each of the {len(indices)} indices that"
                    f" trainable_token_indices gives {module}, within {weight.name} {list(weight.shape)}"
                )
            self._set(weight, rows=(spec, indices))

    # --- what is said

    @property
    def _base(self) -> str:
        base = self.adapter.settings.base
        return f" (it was trained on {base})" if base else ""

    def check_unmatched(self) -> None:
        """Raise BadCheckpoint if tensors of the adapter belong to no tensor of the base."""
        if not self._unmatched:
            return
        shown = ", ".join(self._unmatched[:SHOWN])
        more = f" and {len(self._unmatched) - SHOWN} more" if len(self._unmatched) > SHOWN else ""
        raise BadCheckpoint(
            f"{self.adapter.file.entry.name}:"
            f" {counted(len(self._unmatched), 'of its tensors belongs', 'of its tensors belong')} to no tensor of"
            f" {self.checkpoint.address}: {shown}{more}; give the base that it was trained on{self._base}"
        )

    def notes(self) -> list[str]:
        """Describe the merge for the plan."""
        adapter, settings = self.adapter, self.adapter.settings
        ranks = ", ".join(f"{rank} ({count})" for rank, count in sorted(self._ranks.items()))
        scalings = sorted(self._scalings)
        shown = ", ".join(f"{each:g}" for each in scalings[:SHOWN]) + (", ..." if len(scalings) > SHOWN else "")
        kind = "DoRA" if settings.use_dora else "rsLoRA" if settings.use_rslora else "LoRA"
        said = [
            f"merged into {counted(len(self.merges), 'tensor')}: {adapter.file.address} ({kind}"
            + (f"; rank {ranks}; scaling {shown}" if ranks else "")
            + f"), as the float32 sum, rounded once{self._base}"
        ]
        replaced = [name for name, merge in self.merges.items() if merge.replaced is not None]
        if replaced:
            names = ", ".join(replaced[:SHOWN]) + (", ..." if len(replaced) > SHOWN else "")
            said.append(f"replaced by the adapter's own: {counted(len(replaced), 'tensor')}, {names}")
        return [*said, *self._said, *self._other_files()]

    def _other_files(self) -> list[str]:
        """Say which files of the tokenizer the adapter has otherwise than the base, whose files are carried over."""
        ours = self.checkpoint.source
        theirs = self.adapter.file.files
        found = []
        for name in AUX:
            their, our = theirs.find(name), ours.find(name)
            if their is None or their.size > AUX_LIMIT:
                continue
            same = our is not None and our.size == their.size
            if not same or theirs.read_all(name, AUX_LIMIT) != ours.read_all(name, AUX_LIMIT):
                found.append(name)
        if not found:
            return []
        return [f"the adapter has its own {', '.join(found)}; the base's are written: copy them if they are wanted"]
