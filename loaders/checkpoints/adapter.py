"""Adapters of peft: a folder with adapter_config.json and one file of tensors, by the names of the base's modules."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loaders.checkpoints.adapter_config import CONFIG, LoraSettings, lora_settings
from loaders.checkpoints.checkpoint import open_file
from loaders.dtypes import WEIGHT_DTYPES, is_contiguous
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.limits import CONFIG_VALUES, JSON_CONFIG
from loaders.specs import WeightSpec
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import Entry, PinnedFiles
from loaders.storage.hashes import hash_stored
from loaders.storage.json_files import read_json
from loaders.words import counted

FILES = {"adapter_model.safetensors": "safetensors", "adapter_model.bin": "pytorch"}  # in peft's order
# Names around the base's own: peft's two, and those of torch.compile and FSDP.
AROUND = re.compile(r"^base_model\.model\.|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module)\.")
PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<of>weight|bias))?$"
)
TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?$")
SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
INNER = ".base_layer"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One version of an adapter's file of tensors, and the xxh3-128 of its bytes."""

    # The address is no part of what the file is, so that a moved adapter is the same one.
    address: Address = field(repr=False, compare=False)
    entry: Entry
    digest: str

    @property
    def files(self) -> PinnedFiles:
        """The file, to be read at this version."""
        return PinnedFiles(open_store(self.address), [self.entry])


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An open adapter: its settings, and its tensors by what they are for.

    low_rank: by module, the factors and magnitudes by their names in peft ("lora_A", "lora_B.bias"). A module may end
    in .base_layer, where peft wraps several parameters of one module. full: tensors that replace the base's, by name.
    tokens: rows of embeddings, by module.
    """

    file: AdapterFile
    settings: LoraSettings
    low_rank: Mapping[str, Mapping[str, WeightSpec]]
    full: Mapping[str, WeightSpec]
    tokens: Mapping[str, WeightSpec]


def open_adapter(where: str | os.PathLike[str] | Address) -> Adapter:
    """Open an adapter, reading its config and the headers of its tensors; its file is hashed.

    Raises:
        BadSpec: there is no adapter, or one that is not merged.
        BadCheckpoint: it is damaged, or holds what is not known.
    """
    address = Address.of(where)
    store = open_store(address)
    if (found := store.absence()) is not None:
        raise BadSpec(f"{setting('adapter')}: expected the folder of an adapter at {address}, found {found}")
    files = PinnedFiles(store)
    name = next((name for name in FILES if files.find(name) is not None), None)
    missing = CONFIG if files.find(CONFIG) is None else " or ".join(FILES)
    if name is None or files.find(CONFIG) is None:
        raise BadSpec(f"{setting('adapter')}: expected an adapter of peft at {address}, found no {missing} there")
    settings = lora_settings(read_json(files, CONFIG, JSON_CONFIG, CONFIG_VALUES))
    opened = open_file(address / name, FILES[name])
    entry = opened.files[0]
    for spec in opened.weights:
        _check(spec)
    low_rank, full, tokens = _sorted(opened.weights)
    return Adapter(
        file=AdapterFile(address, entry, hash_stored(store, entry)),
        settings=settings, low_rank=low_rank, full=full, tokens=tokens,
    )  # fmt: skip


def _check(spec: WeightSpec) -> None:
    if spec.dtype.name not in WEIGHT_DTYPES:
        raise BadCheckpoint(f"{spec.file}: {spec.name} is {spec.dtype}; expected one of {', '.join(WEIGHT_DTYPES)}")
    if spec.stride is not None and not is_contiguous(spec.shape, spec.stride):
        raise BadCheckpoint(f"{spec.file}: {spec.name} is not contiguous; save the adapter as safetensors")
    if 0 in spec.shape or not spec.shape:
        raise BadCheckpoint(
            f"{spec.file}: {spec.name} has shape {list(spec.shape)}: its shards were not gathered when it was saved;"
            " save it again"
        )


def _sorted(
    weights: tuple[WeightSpec, ...],
) -> tuple[dict[str, dict[str, WeightSpec]], dict[str, WeightSpec], dict[str, WeightSpec]]:
    """Sort an adapter's tensors by what they are for; see `Adapter`."""
    low_rank: dict[str, dict[str, WeightSpec]] = {}
    full: dict[str, WeightSpec] = {}
    tokens: dict[str, WeightSpec] = {}
    unknown = []
    for spec in weights:
        name = AROUND.sub("", spec.name)
        if match := PART.match(name):
            part = match["part"] + (".bias" if match["of"] == "bias" else "")
            put, key = low_rank.setdefault(match["module"], {}), part
        elif match := TOKENS.match(name):
            put, key = tokens, match["module"]
        elif ".lora_" in name or ".token_adapter." in name:
            unknown.append(spec.name)
            continue
        else:
            put, key = full, SAVED.sub("", name).replace(INNER, "")
        if key in put:
            raise BadCheckpoint(f"{spec.file}: {spec.name} and {put[key].name} are the same tensor; one is stale")
        put[key] = spec
    if unknown:
        raise BadCheckpoint(
            f"{weights[0].file}: {counted(len(unknown), 'tensor')} of a kind that is not merged, {unknown[0]}"
            " first; merge this"
            " adapter with peft (merge_and_unload)"
        )
    return low_rank, full, tokens
